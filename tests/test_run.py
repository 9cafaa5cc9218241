"""A recipe from start to end gives the row that the table shows, and the same figures as its parts called one by one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlm
import qlm.errors
from qlm.recipe import EvaluateRecipe, Recipe, parse_recipe
from qlm.report import Reporter
from qlm.run import evaluate_on, peak_memory, run_recipe
from tests.conftest import FAMILIES, recipe_text

Folder = Callable[..., Path]


@pytest.fixture
def recipe(text_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(model: Path, backend: str, extra: str = "") -> Recipe:
        return parse_recipe(recipe_text(model, tmp_path / "out", backend, text_file, extra=extra), "test.yaml")

    return make


def run(recipe: Recipe, **more: Any) -> Any:
    with Reporter(quiet=True).progress("test") as tell:
        return run_recipe("a/r.yaml", recipe, tell=tell, **more)


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("backend", ["int8", "gptq"])
def test_row(
    variant: str, backend: str, folder_of: Folder, text_file: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    row = run(recipe(folder_of(variant), backend, f"evaluate: {{data: {text_file}, length: 40, windows: 6}}\n"))
    assert (row.recipe, row.model) == ("a/r.yaml", variant)
    assert row.backend == {"int8": "int8", "gptq": "gptq 4-bit"}[backend]
    assert row.quantize_seconds > 0
    assert row.evaluate_seconds > 0
    assert row.peak_memory > 1e8
    by_hand = evaluate_on(
        tmp_path / "out", EvaluateRecipe(data=str(text_file)), length=40, windows=6, baseline=folder_of(variant)
    )
    assert dataclasses.replace(row.evaluation, seconds=0) == dataclasses.replace(by_hand, seconds=0)
    assert row.evaluation.windows == 6
    assert 0 < row.evaluation.kl_divergence < 0.1
    alone = evaluate_on(folder_of(variant), EvaluateRecipe(data=str(text_file)), length=40, windows=6)
    assert alone.perplexity == pytest.approx(row.evaluation.baseline_perplexity, rel=1e-6)
    assert alone.kl_divergence is None


def test_without_evaluation(folder_of: Folder, recipe: Callable[..., Recipe]) -> None:
    row = run(recipe(folder_of("opt"), "int8"))
    assert row.evaluation is None
    assert row.evaluate_seconds == 0
    assert run(recipe(folder_of("opt"), "int8")).result.resumed == 2
    assert run(recipe(folder_of("opt"), "int8"), force=True).result.resumed == 0


def test_a_failed_evaluation_leaves_the_output(
    folder_of: Folder, recipe: Callable[..., Recipe], text_file: Path, tmp_path: Path
) -> None:
    """The quantized model is complete and good; the same command, with the text mended, goes on from there."""
    (tmp_path / "short.txt").write_text("short")
    wanted = recipe(folder_of("opt"), "int8", f"evaluate: {{data: {tmp_path / 'short.txt'}, length: 40}}\n")
    with pytest.raises(qlm.errors.UsageError, match=r"the text has \d+ tokens, and one window needs 40"):
        run(wanted)
    (tmp_path / "short.txt").write_text(text_file.read_text("utf-8")[:4000], "utf-8")
    row = run(wanted)
    assert row.result.resumed == 2
    assert row.evaluation is not None


def test_peak_memory_can_be_reset() -> None:
    """Linux only: elsewhere it is the peak since the process started."""
    tensor = torch.ones(40_000_000)
    peak = peak_memory()
    del tensor
    after = peak_memory(reset=True)
    assert after <= peak
    if Path("/proc/self/clear_refs").exists():
        assert after < peak - 100e6


@pytest.mark.parametrize(
    ("backend", "settings", "said"),
    [
        ("gptq", {}, "gptq 4-bit"),
        ("gptq", {"quality": "balanced"}, "gptq 4-bit, balanced"),
        ("gptq", {"quality": "fast", "bits": 3}, "gptq 3-bit, fast"),
        ("int8", {}, "int8"),
        ("nf4", {"quality": "fast"}, "nf4"),
        ("nf4", {"quality": "balanced"}, "nf4, balanced"),
        ("quanto", {}, "quanto"),
    ],
)
def test_the_row_names_a_quality_that_was_asked_for(
    backend: str, settings: dict[str, Any], said: str, folder_of: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = parse_recipe(recipe_text(folder_of("opt"), tmp_path / "out", backend, text_file, **settings), "r.yaml")
    assert run_recipe("r", recipe).backend == said
