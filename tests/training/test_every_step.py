"""Stopped at any step, a run ends with the same bytes as one that nobody stopped."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlm.finetune import finetune
from tests.conftest import files_of
from tests.training.runs import checkpoint_hashes, recipe_of, stop_at

STEPS = 40


def test_stopped_at_each_of_40_steps(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """Dropout, accumulation, a schedule, rows of several passes over the data, evaluations: a run that is stopped after every single
    step holds the same parameters, AdamW state, random states and log after each as one that nobody stopped, and ends the same."""
    settings = dict(
        adapter={"dropout": 0.1}, steps=STEPS, gradient_accumulation=2, validation=0.1, evaluate_every=15, warmup=0.2
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    model = folder_of("opt")
    wanted: dict[int, Any] = {}

    def look(what: str, done: int, total: int) -> None:
        wanted.update(checkpoint_hashes(whole))

    finetune(recipe_of(model, whole, data, save_every=1, **settings), progress=look)
    # The last one is taken away with the unfinished folder, and nobody looks in between.
    assert len(wanted) >= STEPS - 1
    for step in range(1, STEPS):
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe_of(model, broken, data, **settings), progress=stop_at(step))
        found = checkpoint_hashes(broken)
        assert max(found) == step
        assert len(found) == min(step, 2)
        if step % 15:
            assert found[step] == wanted[step], step
        else:
            # A measurement is in the log before the save there, and after it here.
            assert found[step]["state.safetensors"] == wanted[step]["state.safetensors"], step
    result = finetune(recipe_of(model, broken, data, **settings))
    assert result.resumed == STEPS - 1
    assert files_of(broken) == files_of(whole)
    assert len([record for record in result.metrics if "loss" in record]) == STEPS
    assert [record["step"] for record in result.metrics if "validation_loss" in record] == [0, 15, 30, 40]
