"""Short runs: their recipes, stopping them, and what lies in their checkpoints."""

import hashlib
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlm.finetune import CHECKPOINTS
from qlm.recipe import FinetuneRecipe
from qlm.training import state as training_state
from tests.conftest import files_of

# The models' own dropout, on while training as in any training of theirs, switched off.
STEADY = {
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
    "neox-parallel-rotary-0.25": {"hidden_dropout": 0.0, "attention_dropout": 0.0, "classifier_dropout": 0.0},
    "bigcode-multi-query": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
# fp32 sums in another order.
SAME_SUMS = 2e-6


def recipe_of(model: object, output: object, data: object, adapter: Any = None, **more: Any) -> FinetuneRecipe:
    top = {key: more.pop(key) for key in ("task", "quantize", "calibration") if key in more}
    train = {
        "data": str(data), "steps": 4, "batch_size": 2, "gradient_accumulation": 1, "max_length": 16,
        "learning_rate": 1e-2, "save_every": 1000, **more,
    }  # fmt: skip
    return FinetuneRecipe.model_validate(
        {"model": str(model), "output": str(output), "train": train, "adapter": {"r": 2, **(adapter or {})}, **top}
    )


def stop_at(step: int, number: int = signal.SIGINT) -> Callable[[str, int, int], None]:
    """A progress that sends this process a signal once a step has been done."""

    def progress(what: str, done: int, total: int) -> None:
        if (what, done) == ("train", step):
            signal.raise_signal(number)

    return progress


def checkpoint_hashes(output: Path) -> dict[int, dict[str, Any]]:
    """Step to the hashes of what its checkpoint holds, read anew."""
    folder = output.with_name(output.name + ".partial") / CHECKPOINTS
    return {
        step: {name: hashlib.sha256(data).hexdigest() for name, data in files_of(folder / f"step-{step:08d}").items()}
        for step in training_state.steps(folder)
    }


def poison(tensor: torch.Tensor, value: float = math.nan) -> None:
    with torch.no_grad():
        # Near the start: later positions are of no row here.
        tensor.view(-1)[tensor.numel() // 16] = value


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def uneven(tmp_path: Path, count: int = 8) -> Path:
    """Texts of very different lengths, so that a mean of means is another number than the mean."""
    return jsonl(tmp_path / "uneven.jsonl", [{"text": "word and " * (1 + 5 * (i % 4))} for i in range(count)])
