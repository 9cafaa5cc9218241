"""An adapter that starts as the repair of what quantizing to 3 bits lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlm.finetune import finetune
from qlm.recipe import FinetuneRecipe
from tests.conftest import ROOT, files_of
from tests.training.runs import recipe_of, stop_at

# Trained, so that what quantizing loses is lost of something; without dropout of its own.
MODEL = ROOT / "evals" / "checkpoints" / "tiny-opt"
TEXT = ROOT / "calibration_data" / "english.txt"


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., FinetuneRecipe]:
    data = tmp_path / "data.txt"
    data.write_text(TEXT.read_text("utf-8")[:20_000], "utf-8")

    def make(name: str, initialization: str = "svd", **more: Any) -> FinetuneRecipe:
        adapter = {"r": 16, "dropout": 0.0, "initialization": initialization}
        # What the other qualities aim at is not the float weight, but what makes good the errors of earlier layers; W - Q is then no loss.
        quantize = {"backend": "gptq", "bits": 3, "quality": "fast"}
        calibration = {"data": str(data), "samples": 4, "length": 64}
        settings = dict(steps=3, batch_size=4, max_length=64, validation=0.1, learning_rate=1e-3, warmup=0.5)
        return recipe_of(
            MODEL, tmp_path / name, data, adapter, quantize=quantize, calibration=calibration, **{**settings, **more}
        )

    return make


def test_it_starts_nearer_to_the_float_model(recipe: Callable[..., FinetuneRecipe], tmp_path: Path) -> None:
    """Loss of the first step and of the validation before it: not above those of an adapter that starts at zero. Stopped and gone on with,
    it is the same run."""
    results = {name: finetune(recipe(name, name)) for name in ("standard", "svd")}
    losses = {name: [record for record in result.metrics if "loss" in record] for name, result in results.items()}
    assert losses["svd"][0]["loss"] <= losses["standard"][0]["loss"]
    before = {name: result.training["validation"]["before"]["validation_loss"] for name, result in results.items()}
    assert before["svd"] < before["standard"]

    with pytest.raises(KeyboardInterrupt):
        finetune(recipe("broken"), progress=stop_at(2))
    assert finetune(recipe("broken")).resumed == 2
    broken, whole = files_of(tmp_path / "broken"), files_of(tmp_path / "svd")
    # The others hold the name of the base.
    for name in ("adapter_model.safetensors", "metrics.jsonl", "report.html"):
        assert broken[name] == whole[name], name
