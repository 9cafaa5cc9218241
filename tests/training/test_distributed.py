"""Two gloo processes on the CPU, started by torchrun and by accelerate: the same run as one process with twice the accumulation."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlm.checkpoint.adapter import read_adapter
from qlm.errors import UsageError
from qlm.finetune import finetune
from qlm.recipe import FinetuneRecipe
from tests.conftest import ROOT, files_of

# The gradients of two processes are added after each has added its own: fp32 sums in another order, which Adam's first steps, in
# which small gradients count as much as large ones, make larger.
SAME_CURVE = 2e-4

PROGRAM = """
import json, sys
import torch
torch.set_num_threads(1)
import signal
from qlm.errors import QlmError
from qlm.finetune import finetune
from qlm.recipe import FinetuneRecipe

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))

def tell(what, done, total):
    if len(sys.argv) > 2 and what == "train" and done == int(sys.argv[2]):
        # One of the two alone is told to stop.
        import os
        if os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)

result = finetune(FinetuneRecipe.model_validate(json.loads(sys.argv[1])), progress=tell)
print(json.dumps({"resumed": result.resumed, "steps": result.steps}))
"""


def settings(model: Path, output: Path, data: Path, **train: Any) -> dict[str, Any]:
    return {
        "model": str(model), "output": str(output), "adapter": {"r": 2, "dropout": 0.0},
        "train": {
            "data": str(data), "steps": 8, "batch_size": 2, "gradient_accumulation": 2, "max_length": 24, "packing": False,
            "learning_rate": 1e-3, "warmup": 0.25, "validation": str(data), "evaluate_every": 4, **train,
        },
    }  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts of different lengths: means of the processes' means would be another curve."""
    path = tmp_path / "data.jsonl"
    rows = [{"text": "word and " * (1 + i % 4) + str(i)} for i in range(11)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def model(copy_of: Callable[..., Path]) -> Path:
    return copy_of("opt", dropout=0.0, attention_dropout=0.0)


def launch(tmp_path: Path, recipe: dict[str, Any], *arguments: str, launcher: tuple[str, ...] = ()) -> Any:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = launcher or ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *launcher, str(program), json.dumps(recipe), *arguments],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def same_curve(output: Path, other: Path) -> None:
    one, two = records(output), records(other)
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for first, second in zip(one, two, strict=True):
        for key, value in first.items():
            assert second[key] == (pytest.approx(value, rel=SAME_CURVE) if isinstance(value, float) else value), key


def test_two_processes(model: Path, data: Path, tmp_path: Path) -> None:
    """The loss curve, the validation loss and the adapter; then stopped by a signal that one of them gets, and gone on with."""
    finetune(FinetuneRecipe.model_validate(settings(model, tmp_path / "one", data, gradient_accumulation=4)))
    done = launch(tmp_path, settings(model, tmp_path / "two", data))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"steps": 8') == 2
    same_curve(tmp_path / "one", tmp_path / "two")
    wanted, found = (read_adapter(tmp_path / name).tensors for name in ("one", "two"))
    for name, tensor in wanted.items():
        # Adam divides by the gradient's own size: where that is almost zero, another order of sums is another step.
        assert abs(tensor - found[name]).max() < 0.05 * max(abs(tensor).max(), 1e-2), name

    stopped = launch(tmp_path, settings(model, tmp_path / "broken", data), "3")
    assert stopped.returncode != 0
    folder = tmp_path / "broken.partial" / "checkpoints"
    assert [path.name for path in folder.glob("step-*")] == ["step-00000004"]
    done = launch(tmp_path, settings(model, tmp_path / "broken", data))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"resumed": 4') == 2
    assert files_of(tmp_path / "broken") == files_of(tmp_path / "two")


def test_accelerate_launch(model: Path, data: Path, tmp_path: Path) -> None:
    """The same bytes as under torchrun."""
    # With --cpu accelerate starts one process (its several CPU processes are MPI's); the device is the recipe's run's own affair.
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no")
    for name, how in (("accelerate", launcher), ("torchrun", ())):
        done = launch(tmp_path, settings(model, tmp_path / name, data, steps=3), launcher=how)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"steps": 3') == 2
    assert files_of(tmp_path / "accelerate") == files_of(tmp_path / "torchrun")


def test_fsdp_on_a_cpu_is_refused(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="asks for FSDP, which it has on GPUs only; found cpu"):
        finetune(FinetuneRecipe.model_validate(settings(model, tmp_path / "out", data)))
    assert not list(tmp_path.glob("out*"))
