"""Runs of several processes on the CPU, started by torchrun or by accelerate: their recipes, and what comes out of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlm.checkpoint.adapter import read_adapter
from tests.conftest import ROOT
from tests.training.runs import jsonl

# The gradients of two processes are added after each has added its own: fp32 sums in another order, which Adam's first steps, in
# which small gradients count as much as large ones, make larger.
SAME_CURVE = 2e-4
NF4 = {"backend": "nf4", "double_quant": True}
CONFIGURATIONS = ROOT / "recipes" / "qlora" / "accelerate"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
# Port 0: any that is free.
ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")

PROGRAM = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from qlm.errors import QlmError
from qlm.finetune import finetune
from qlm.recipe import FinetuneRecipe

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))

def say(**facts):
    # In one piece: the other process writes to the same pipe.
    os.write(1, (json.dumps({"rank": int(os.environ["RANK"]), **facts}) + "\\n").encode())

for recipe, stop in json.loads(sys.argv[1]):
    def tell(what, done, total):
        # One of the two alone is told to stop.
        if (what, done) == ("train", stop) and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)

    output = os.path.basename(recipe["output"])
    try:
        result = finetune(FinetuneRecipe.model_validate(recipe), progress=tell)
        say(output=output, steps=result.steps, resumed=result.resumed)
    except SystemExit as ended:
        say(output=output, exit=ended.code)
    except QlmError as error:
        say(output=output, error=str(error))
"""


def settings(model: Path, output: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as plain values; `changes` are keys of `train`, or sections beside it."""
    top = {key: changes.pop(key) for key in ("quantize", "task") if key in changes}
    return {
        "model": str(model), "output": str(output), "adapter": {"r": 2, "dropout": 0.0}, **top,
        "train": {
            "data": str(data), "steps": 8, "batch_size": 2, "gradient_accumulation": 2, "max_length": 24, "packing": False,
            "learning_rate": 1e-3, "warmup": 0.25, "validation": str(data), "evaluate_every": 4, **changes,
        },
    }  # fmt: skip


def launch(
    tmp_path: Path,
    *recipes: dict[str, Any] | tuple[dict[str, Any], int],
    launcher: tuple[str, ...] = TORCHRUN,
    before: str = "",
    **environment: str,
) -> list[dict[str, Any]]:
    """Run the recipes one after the other in two processes, which come up once; one with a number is stopped after that step.

    Args:
        before: Python that each process runs first.
    Returns:
        what the processes say, in any order of the two.
    """
    program = tmp_path / "program.py"
    program.write_text(before + PROGRAM)
    known = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    wanted = [recipe if isinstance(recipe, tuple) else (recipe, None) for recipe in recipes]
    done = subprocess.run(
        [sys.executable, *launcher, str(program), json.dumps(wanted)],
        env={**os.environ, **known, **environment}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def said(found: list[dict[str, Any]], output: str) -> list[dict[str, Any]]:
    """What was said of one run, in the order of the ranks and without them."""
    of_it = sorted((facts for facts in found if facts.get("output") == output), key=lambda facts: facts["rank"])
    return [{key: value for key, value in facts.items() if key not in ("rank", "output")} for facts in of_it]


def of_different_lengths(tmp_path: Path) -> Path:
    """Texts of which the processes get different numbers of tokens: means of their means would be another curve."""
    return jsonl(tmp_path / "data.jsonl", [{"text": "word and " * (1 + i % 4) + str(i)} for i in range(11)])


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def same_curve(output: Path, other: Path) -> None:
    one, two = records(output), records(other)
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for first, second in zip(one, two, strict=True):
        for key, value in first.items():
            assert second[key] == (pytest.approx(value, rel=SAME_CURVE) if isinstance(value, float) else value), key


def same_adapter(output: Path, other: Path) -> None:
    wanted, found = (read_adapter(folder).tensors for folder in (output, other))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        # Adam divides by the gradient's own size: where that is almost zero, another order of sums is another step.
        assert abs(tensor - found[name]).max() < 0.05 * max(abs(tensor).max(), 1e-2), name
