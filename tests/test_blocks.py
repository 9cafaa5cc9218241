"""What is on record about each linear of a block, and about the parts of those that hold several."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlm.arch import FAMILIES
from qlm.backends import BACKENDS
from qlm.blocks import stages_of
from qlm.errors import UsageError
from qlm.load import block_paths
from qlm.quantize import quantize_model, stream_of
from qlm.recipe import QuantizeRecipe, quantize_section, settings_for
from tests import tiny_models

# float32 products of differences, under a Hessian of condition 1e3.
TOLERANCE = 1e-3
WAYS = [("gptq", "fast"), ("nf4", "fast"), ("int8", "fast"), ("nf4", "balanced"), ("int8", "balanced")]


def weight_of(module: nn.Module, name: str, backend: str, section: QuantizeRecipe) -> Tensor:
    """float64 [O, I], from the stored tensors."""
    settings = settings_for(section, name)
    assert settings is not None
    shape = (module.out_features, module.in_features)
    how = BACKENDS[backend].format(settings, torch.float32)
    return BACKENDS[backend].dequantize(module.state_dict(), shape, how).double()


def parts_of(model: Any, name: str) -> dict[str, list[int]]:
    """Rows by part, written as the two families' reference code slices them."""
    heads, width = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
    outputs = model.get_submodule(name).out_features
    if outputs == (heads + 2) * width:
        return {
            "q": [*range(heads * width)],
            "k": [*range(heads * width, outputs - width)],
            "v": [*range(outputs - width, outputs)],
        }
    rows = torch.arange(outputs).view(heads, 3, width)
    return {part: rows[:, i].flatten().tolist() for i, part in enumerate("qkv")}


@torch.no_grad()
@pytest.mark.parametrize(("backend", "quality"), WAYS, ids=[" ".join(way) for way in WAYS])
@pytest.mark.parametrize("variant", ["opt", "neox-parallel-rotary-0.25", "bigcode-multi-query", "bigcode-multi-head"])
def test_each_linear_and_each_part_has_an_error_of_its_own(variant: str, backend: str, quality: str) -> None:
    """The first linears of a model read the same in both models and are not shifted: their error can be told from their weights."""
    model, ids = tiny_models.build(variant), tiny_models.token_ids(16, 64)
    spec = FAMILIES[model.config.model_type]
    path = block_paths(spec, model)[0]
    names = [f"{path}.{linear}" for linear in stages_of(spec, model.config)[0][0].linears]
    more: dict[str, Any] = {"smooth": False, "target_shift": 0.0} if (backend, quality) == ("int8", "balanced") else {}
    section = quantize_section({"backend": backend, "quality": quality, **more}, True)
    before = {name: model.get_submodule(name).weight.double().clone() for name in names}
    calibrated = section.needs_calibration
    H = torch.eye(model.config.hidden_size, dtype=torch.float64)
    if calibrated:
        stream = stream_of(copy.deepcopy(model), spec, path, ids, "cpu", section)
        group = stages_of(spec, model.config)[0][0]
        block = copy.deepcopy(model.get_submodule(path))
        rounds = BACKENDS[backend].as_multiplied
        rounded = {} if rounds is None else {group: rounds}
        H = stream.statistics(
            block, [group], path, copy.deepcopy(block) if stream.reference is not None else None, rounded
        )[group].hessian.double()
    facts = quantize_model(model, section, ids if calibrated else None)
    if calibrated:
        H = H + facts[names[0]]["damp"] * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)

    def relative(W: Tensor, E: Tensor) -> float:
        lost, size = (torch.einsum("oi,ij,oj->", x, H, x).item() for x in (E, W))
        return math.sqrt(lost / size)

    found = []
    for name in names:
        W = before[name]
        E = W - weight_of(model.get_submodule(name), name, backend, section)
        assert facts[name]["relative_error"] == pytest.approx(relative(W, E), rel=TOLERANCE)
        found.append(facts[name]["relative_error"])
        if variant == "opt":
            assert "parts" not in facts[name]
            continue
        rows = parts_of(model, name)
        assert list(facts[name]["parts"]) == ["q", "k", "v"]
        for part, fact in facts[name]["parts"].items():
            assert fact == {"relative_error": pytest.approx(relative(W[rows[part]], E[rows[part]]), rel=TOLERANCE)}
            found.append(fact["relative_error"])
    assert len(set(found)) == len(found)
    assert not any(
        "parts" in fact for name, fact in facts.items() if name.rpartition(".")[2] not in ("query_key_value", "c_attn")
    )


@torch.no_grad()
def test_q_k_and_v_may_have_bits_of_their_own() -> None:
    """OPT's are linears apart; a fused projection's are rows of one packed matrix, which has one width."""
    model, ids = tiny_models.build("opt"), tiny_models.token_ids(8, 32)
    bits = {"q_proj": 2, "k_proj": 3, "v_proj": 8}
    overrides = {f"*.{name}": {"bits": width} for name, width in bits.items()}
    facts = quantize_model(model, {"backend": "gptq", "overrides": overrides}, ids)
    for name, fact in facts.items():
        assert fact["bits"] == bits.get(name.rpartition(".")[2], 4)
        assert model.get_submodule(name).bits == fact["bits"]
    for layer in range(2):
        errors = [facts[f"model.decoder.layers.{layer}.self_attn.{name}"]["relative_error"] for name in bits]
        assert errors[0] > 2 * errors[1] > 8 * errors[2]
    with pytest.raises(UsageError, match="matches none"):
        quantize_model(
            tiny_models.build("bigcode-multi-query"), {"backend": "gptq", "overrides": {"*.c_attn.q": {"bits": 2}}}, ids
        )


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "up", "down"), [("opt", "fc1", "fc2"), ("bigcode-multi-query", "c_fc", "mlp.c_proj")]
)
def test_inputs_that_keep_16_bits(variant: str, up: str, down: str) -> None:
    """Outliers of an MLP's inner features, which take all steps of its tokens' grids: the weights alone are then the better half."""
    ids = tiny_models.token_ids(8, 32)

    def outlying() -> Any:
        model = tiny_models.build(variant)
        for name, module in model.named_modules():
            if name.endswith(up):
                module.weight[:4] *= 100
                module.bias[:4] *= 100
            if name.endswith(down):
                module.weight[:, :4] /= 100
        return model

    expected, errors = outlying()(ids).logits, {}
    for globs in ([], [f"*.{down}"]):
        model = outlying()
        facts = quantize_model(model, {"backend": "int8", "smooth": False, "sweeps": 0, "input_16bit": globs}, ids)
        errors[len(globs)] = (model(ids).logits - expected).norm()
        for name, fact in facts.items():
            as_it_is = bool(globs) and name.endswith(f".{down}")
            assert fact["activations"] == ("float" if as_it_is else "int8 per token")
            assert model.get_submodule(name).float_input == as_it_is
            if name.endswith(f".{down}"):
                assert fact["outliers"]
                assert set(fact["outliers"]) <= set(range(4))
                assert fact["largest_over_median_input"] > 20
            else:
                assert (fact["outlier_inputs"], fact["outliers"]) == (0, [])
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"backend": "int8", "input_16bit": ["*.fc3"]}, "matches none of the model's linears"),
        ({"backend": "int8", "input_16bit": ["*.fc2"], "skip": ["*.fc2"]}, "here and in skip, which wins"),
        ({"backend": "nf4", "input_16bit": ["*.fc2"]}, "found with backend nf4"),
    ],
    ids=["no such linear", "skipped as well", "another backend"],
)
def test_inputs_that_cannot_keep_16_bits(section: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        quantize_model(tiny_models.build("opt"), section)
