"""Nothing that is not finite goes by."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlm.errors import DataError
from qlm.finetune import finetune
from qlm.recipe import FinetuneRecipe
from qlm.training import watchdog
from qlm.training.loop import TrainingLoop
from tests.conftest import files_of
from tests.training.runs import checkpoint_hashes, poison, recipe_of, stop_at

Inject = Callable[[Any], None]


def parameter_of(trainer: Any, name: str) -> torch.nn.Parameter:
    (found,) = [parameter for key, parameter in trainer.model.named_parameters() if key.endswith(name)]
    return found


def token(trainer: Any) -> None:
    """A row of the embedding, of a token of the step's data."""
    weight = trainer.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[trainer.job.rows[trainer.job.order[4]]["input_ids"][3], 5] = math.nan


def value(name: str) -> tuple[Inject, str]:
    return lambda trainer: poison(
        parameter_of(trainer, name), math.inf
    ), f"the loss is (nan|-?inf): .*{re.escape(name)} "


def activation(name: str) -> tuple[Inject, str]:
    def inject(trainer: Any) -> None:
        (module,) = [m for n, m in trainer.model.named_modules() if n.endswith(name)]
        module.register_forward_hook(lambda module, inputs, output: output * math.nan)

    return inject, f"the loss is nan: output of .*{re.escape(name)};"


def gradient(name: str, factor: float) -> tuple[Inject, str]:
    def inject(trainer: Any) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            spoiled = gradient.clone()
            spoiled.view(-1)[7] = factor
            return spoiled

        parameter_of(trainer, name).register_hook(spoil)

    return inject, f"the gradient's norm is {factor}: .*{re.escape(name)} "


def overflow(name: str) -> tuple[Inject, str]:
    """Every gradient is finite, and their norm is not."""
    inject, _ = gradient(name, 3e38)
    return inject, rf"the gradient's norm is inf: .*{re.escape(name)} has the largest, 3e\+38;"


def loss(factor: float) -> tuple[Inject, str]:
    def inject(trainer: Any) -> None:
        original = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: original(*a, **k) * factor

    return inject, f"the loss is {factor};"


def moment(name: str, key: str) -> tuple[Inject, str]:
    def inject(trainer: Any) -> None:
        poison(trainer.optimizer.state[parameter_of(trainer, name)][key])

    return inject, f"the optimizer's state is not finite: .*{re.escape(name)}: {key} "


A, B = "lora_A.default.weight", "lora_B.default.weight"
PLACES = {
    "token": (token, r"the loss is nan: .*embed_tokens\.weight "),
    "position": value("embed_positions.weight"),
    "weight-0-q": value("layers.0.self_attn.q_proj.base_layer.weight"),
    "weight-0-fc1": value("layers.0.fc1.base_layer.weight"),
    "weight-1-out": value("layers.1.self_attn.out_proj.base_layer.weight"),
    "weight-1-fc2": value("layers.1.fc2.base_layer.weight"),
    "bias-0-k": value("layers.0.self_attn.k_proj.base_layer.bias"),
    "bias-0-fc1": value("layers.0.fc1.base_layer.bias"),
    "bias-1-fc2": value("layers.1.fc2.base_layer.bias"),
    "norm-0-attention": value("layers.0.self_attn_layer_norm.weight"),
    "norm-1-mlp-bias": value("layers.1.final_layer_norm.bias"),
    "norm-last": value("decoder.final_layer_norm.weight"),
    "activation-0-v": activation("layers.0.self_attn.v_proj.base_layer"),
    "activation-1-fc1": activation("layers.1.fc1.base_layer"),
    "a-0-q": value(f"layers.0.self_attn.q_proj.{A}"),
    "a-0-fc2": value(f"layers.0.fc2.{A}"),
    "a-1-v": value(f"layers.1.self_attn.v_proj.{A}"),
    "b-0-k": value(f"layers.0.self_attn.k_proj.{B}"),
    "b-1-out": value(f"layers.1.self_attn.out_proj.{B}"),
    "b-1-fc1": value(f"layers.1.fc1.{B}"),
    "gradient-0-k-a": gradient(f"layers.0.self_attn.k_proj.{A}", math.nan),
    "gradient-0-fc1-a": gradient(f"layers.0.fc1.{A}", math.inf),
    "gradient-1-q-b": gradient(f"layers.1.self_attn.q_proj.{B}", math.inf),
    "gradient-1-fc2-b": gradient(f"layers.1.fc2.{B}", math.nan),
    "gradient-0-v-b": overflow(f"layers.0.self_attn.v_proj.{B}"),
    "loss-nan": loss(math.nan),
    "loss-inf": loss(math.inf),
    "first-0-v-a": moment(f"layers.0.self_attn.v_proj.{A}", "exp_avg"),
    "first-1-q-a": moment(f"layers.1.self_attn.q_proj.{A}", "exp_avg"),
    "first-1-fc2-b": moment(f"layers.1.fc2.{B}", "exp_avg"),
    "second-0-v-a": moment(f"layers.0.self_attn.v_proj.{A}", "exp_avg_sq"),
    "second-0-fc1-b": moment(f"layers.0.fc1.{B}", "exp_avg_sq"),
    "second-1-out-a": moment(f"layers.1.self_attn.out_proj.{A}", "exp_avg_sq"),
}
assert len(PLACES) >= 30
# After these the run is gone on with to its end.
CONTINUED = ("weight-0-q", "gradient-1-q-b", "loss-nan", "second-0-v-a")


@pytest.fixture(scope="module")
def settings(
    folder_of: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Callable[[Path], FinetuneRecipe], Path, Path]:
    """(Recipe for an output, folder of a run of it that was stopped after step 2, output of one that nobody stopped)"""
    folder = tmp_path_factory.mktemp("watchdog")
    data = folder / "data.txt"
    data.write_text(text_file.read_text("utf-8")[:9000], "utf-8")

    def recipe(output: Path) -> FinetuneRecipe:
        return recipe_of(folder_of("opt"), output, data, save_every=1, adapter={"dropout": 0.0})

    finetune(recipe(folder / "whole"))
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe(folder / "stopped"), progress=stop_at(2))
    return recipe, folder / "stopped.partial", folder / "whole"


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_finite_stops_the_run_before_the_step(
    place: str,
    settings: tuple[Callable[[Path], FinetuneRecipe], Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Injected before step 3 of a run that has saved step 2: the step and the place are named, nothing was applied, and the same
    command goes on from step 2 to the end as if nothing had been."""
    inject, expected = PLACES[place]
    recipe, stopped, whole = settings
    output = tmp_path / "out"
    shutil.copytree(stopped, tmp_path / "out.partial")
    before = checkpoint_hashes(output)
    begin, applied = TrainingLoop.begin_step, []

    def begin_step(self: Any) -> None:
        begin(self)
        assert self.state.global_step == 2
        inject(self)
        step = self.optimizer.step
        self.optimizer.step = lambda *a, **k: (applied.append(1), step(*a, **k))

    monkeypatch.setattr(TrainingLoop, "begin_step", begin_step)
    with pytest.raises(DataError, match=f"^step 3: {expected}") as error:
        finetune(recipe(output))
    monkeypatch.undo()
    assert "this step was not applied, and the checkpoint of step 2 is kept" in str(error.value)
    assert applied == []
    assert checkpoint_hashes(output) == before
    if place in CONTINUED:
        assert finetune(recipe(output)).resumed == 2
        assert files_of(output) == files_of(whole)


def test_values_that_are_not_finite_are_never_saved(
    folder_of: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong between the check and the save."""
    step = torch.optim.AdamW.step

    def spoil(self: Any, *arguments: Any, **more: Any) -> None:
        step(self, *arguments, **more)
        if self.state[self.param_groups[0]["params"][0]]["step"] == 3:
            poison(self.param_groups[0]["params"][0])

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(DataError, match=r"after 3 steps there are values that are not finite: .*lora_A"):
        finetune(recipe_of(folder_of("opt"), tmp_path / "out", data, save_every=1))
    assert max(checkpoint_hashes(tmp_path / "out")) == 2


def test_what_is_not_finite_is_named() -> None:
    bad = torch.ones(4, 4)
    bad[1, 2], bad[3, 3] = float("nan"), float("inf")
    tensors = [("whole", torch.arange(3)), ("fine", torch.ones(3)), ("bad", bad), ("worse", bad)]
    assert watchdog.not_finite(tensors) == "bad (2 of 16 values)"
    assert watchdog.not_finite(tensors[:2]) is None
