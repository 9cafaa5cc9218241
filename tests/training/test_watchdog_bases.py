"""Nothing that is not finite goes by on quantized bases either, and on the other families."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qlm
from qlm.backends.nf4_linear import hold_as
from qlm.errors import DataError
from qlm.finetune import finetune
from qlm.training import watchdog
from qlm.training.loop import TrainingLoop
from tests.conftest import FAMILIES
from tests.test_adapters import Quantized, quantized_fixture  # noqa: F401  (a fixture)
from tests.training.runs import checkpoint_hashes, poison, recipe_of
from tests.training.test_watchdog import A, B, Inject, gradient, moment

OPT, NEOX, BIGCODE = FAMILIES


def tensor(name: str) -> tuple[Inject, str]:
    """A parameter or buffer of the model, or the scales of an NF4 linear, which are neither."""

    def inject(trainer: Any) -> None:
        model = trainer.model
        path, _, leaf = name.rpartition(".")
        if leaf in ("absmax", "nested_absmax"):
            ends = path.removesuffix(".weight")
            (linear,) = [module for key, module in model.named_modules() if key.endswith(ends)]
            state = linear.quant_state
            poison(state.absmax if leaf == "absmax" else state.state2.absmax)
            return
        tensors = [*model.named_parameters(), *model.named_buffers()]
        (found,) = [value for key, value in tensors if key.endswith(name)]
        poison(found)

    return inject, rf"the loss is nan: .*{re.escape(name)} "


# The base, and what is spoiled in it.
PLACES: dict[str, tuple[str, str, tuple[Inject, str]]] = {
    "nf4-absmax": (NEOX, "nf4", tensor("layers.0.attention.dense.base_layer.weight.absmax")),
    "nf4-last-absmax": (NEOX, "nf4", tensor("layers.1.mlp.dense_4h_to_h.base_layer.weight.absmax")),
    "nf4-bias": (NEOX, "nf4", tensor("layers.1.attention.query_key_value.base_layer.bias")),
    "nf4-norm": (NEOX, "nf4", tensor("layers.0.input_layernorm.weight")),
    "nf4-last-norm": (NEOX, "nf4", tensor("final_layer_norm.bias")),
    "nf4-a": (NEOX, "nf4", tensor(f"layers.1.mlp.dense_h_to_4h.{A}")),
    "nf4-first": (NEOX, "nf4", moment(f"layers.0.attention.query_key_value.{B}", "exp_avg")),
    "nf4-gradient": (NEOX, "nf4", gradient(f"layers.0.mlp.dense_4h_to_h.{B}", math.nan)),
    "gptq-scales": (BIGCODE, "gptq", tensor("h.0.attn.c_attn.base_layer.scales")),
    "gptq-last-scales": (BIGCODE, "gptq", tensor("h.1.mlp.c_proj.base_layer.scales")),
    "gptq-norm": (BIGCODE, "gptq", tensor("h.1.ln_2.weight")),
    "gptq-b": (BIGCODE, "gptq", tensor(f"h.0.mlp.c_fc.{B}")),
    "gptq-second": (BIGCODE, "gptq", moment(f"h.1.attn.c_attn.{A}", "exp_avg_sq")),
    "gptq-gradient": (BIGCODE, "gptq", gradient(f"h.0.attn.c_proj.{A}", math.inf)),
    "int8-scale": (BIGCODE, "int8", tensor("h.0.mlp.c_fc.base_layer.weight_scale")),
    "int8-last-scale": (BIGCODE, "int8", tensor("h.1.mlp.c_proj.base_layer.weight_scale")),
    "int8-norm": (BIGCODE, "int8", tensor("h.0.ln_1.bias")),
    "int8-last-norm": (BIGCODE, "int8", tensor("ln_f.weight")),
    "int8-a": (BIGCODE, "int8", tensor(f"h.1.attn.c_proj.{A}")),
    "int8-first": (BIGCODE, "int8", moment(f"h.0.attn.c_attn.{A}", "exp_avg")),
    "int8-gradient": (BIGCODE, "int8", gradient(f"h.1.mlp.c_fc.{B}", math.nan)),
    "opt-absmax": (OPT, "nf4", tensor("layers.0.self_attn.k_proj.base_layer.weight.absmax")),
    "opt-scales": (OPT, "gptq", tensor("layers.1.fc2.base_layer.scales")),
    "opt-scale": (OPT, "int8", tensor("layers.0.fc1.base_layer.weight_scale")),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_finite_stops_the_run_before_the_step(
    place: str, quantized: Quantized, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected before step 2 of a run that has saved step 1: the step and the place are named, and nothing was applied."""
    variant, kind, (inject, expected) = PLACES[place]
    begin, kept = TrainingLoop.begin_step, {}

    def begin_step(self: Any) -> None:
        begin(self)
        if self.state.global_step == 1:
            kept.update(checkpoint_hashes(tmp_path / "out"))
            inject(self)
            monkeypatch.setattr(type(self.optimizer.optimizer), "step", pytest.fail)

    monkeypatch.setattr(TrainingLoop, "begin_step", begin_step)
    with pytest.raises(DataError, match=f"^step 2: {expected}") as error:
        # A warm-up would leave B, and with it all gradients of A, at zero in the first step.
        finetune(
            recipe_of(quantized(variant, kind), tmp_path / "out", data, {"dropout": 0.0}, save_every=1, warmup=0.0)
        )
    assert "this step was not applied, and the checkpoint of step 1 is kept" in str(error.value)
    assert kept.keys() == {1}
    assert checkpoint_hashes(tmp_path / "out") == kept


def test_codes_held_as_floats_are_no_values(quantized: Quantized) -> None:
    """Under FSDP2 packed codes lie in floats, of which some are NaN; the scales beside them are looked at, quantized ones too."""
    model = qlm.load(quantized(OPT, "nf4"))
    hold_as(model, torch.bfloat16)
    weights = [p for p in model.parameters() if hasattr(p, "quant_state")]
    poison(weights[0])
    assert watchdog.not_finite([("weight", weights[0])]) is not None
    assert watchdog.where_from(model, {}, [], lambda batch: None) is None
    poison(weights[3].quant_state.absmax)
    assert re.search(
        r"\.weight\.absmax \(1 of \d+ values\)", watchdog.where_from(model, {}, [], lambda batch: None) or ""
    )
