"""Two gloo processes on the CPU, started by torchrun and by accelerate: the same run as one process with twice the accumulation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlm.errors import UsageError
from qlm.finetune import finetune
from qlm.recipe import FinetuneRecipe
from tests.conftest import files_of
from tests.training.launched import (
    ACCELERATE,
    CONFIGURATIONS,
    NF4,
    launch,
    of_different_lengths,
    said,
    same_adapter,
    same_curve,
    settings,
)

BASES: dict[str, dict[str, Any]] = {"float": {}, "nf4": {"quantize": NF4}}


@pytest.fixture
def model(copy_of: Callable[..., Path]) -> Path:
    return copy_of("opt", dropout=0.0, attention_dropout=0.0)


def test_two_processes(model: Path, tmp_path: Path) -> None:
    """The loss curve, the validation loss and the adapter, on a float and on an NF4 base; then stopped by a signal that one of them gets,
    and gone on with in new processes, which accelerate starts with the configuration that comes with the recipes."""
    data = of_different_lengths(tmp_path)
    for base, how in BASES.items():
        one = settings(model, tmp_path / f"one-{base}", data, gradient_accumulation=4, **how)
        finetune(FinetuneRecipe.model_validate(one))
    two = [settings(model, tmp_path / f"two-{base}", data, **how) for base, how in BASES.items()]
    broken = settings(model, tmp_path / "broken", data, quantize=NF4)
    found = launch(tmp_path, *two, (broken, 3))
    for base in BASES:
        assert said(found, f"two-{base}") == [{"steps": 8, "resumed": 0}] * 2
        same_curve(tmp_path / f"one-{base}", tmp_path / f"two-{base}")
        same_adapter(tmp_path / f"one-{base}", tmp_path / f"two-{base}")

    assert said(found, "broken") == [{"exit": 143}] * 2
    folder = tmp_path / "broken.partial" / "checkpoints"
    assert [path.name for path in folder.glob("step-*")] == ["step-00000004"]
    found = launch(tmp_path, broken, launcher=(*ACCELERATE, "--config_file", str(CONFIGURATIONS / "ddp.yaml")))
    assert said(found, "broken") == [{"steps": 8, "resumed": 4}] * 2
    wanted, gone_on = files_of(tmp_path / "two-nf4"), files_of(tmp_path / "broken")
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert gone_on[name] == wanted[name], name


def test_fsdp_on_a_cpu_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="asks for FSDP, which it has on GPUs only; found cpu"):
        finetune(FinetuneRecipe.model_validate(settings(model, tmp_path / "out", of_different_lengths(tmp_path))))
    assert not list(tmp_path.glob("out*"))
