"""int8: file tensors, arithmetic against an int64 emulation, and what its config may say."""

import copy
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from qlm.backends import BACKENDS, Statistics, backend_of
from qlm.backends.int8 import Int8Backend, Int8Format
from qlm.errors import DataError
from tests.backends.conftest import check_gradients, check_layout, random, settings_of

backend = Int8Backend()
SHAPE = (48, 160)
# Relative to the largest output: the order of three float32 roundings.
TOLERANCE = 1e-6


def emulated(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, symmetric: bool) -> Tensor:
    """One output at a time in int64, written from the format's words; float32 only where the format says so."""
    out = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for t, token in enumerate(x):
        low, high = min(float(token.min()), 0.0), max(float(token.max()), 0.0)
        if symmetric:
            step, zero = torch.tensor(max(-low, high)) / 127.5, 0
        else:
            step = (torch.tensor(high) - torch.tensor(low)) / 255
            zero = int(torch.clamp(-128 - torch.tensor(low) / step, -128, 127).round()) if step > 0 else 0
        q = (
            torch.clamp(token / step + zero, -128, 127).round().long()
            if step > 0
            else torch.zeros(len(token), dtype=torch.int64)
        )
        for o, row in enumerate(weight.long()):
            total = int(((q - zero) * row).sum())
            out[t, o] = total * float(step) * float(scale[o]) + float(bias[o])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric-input", "asymmetric-input"])
def test_from_weight_to_output(dtype: torch.dtype, symmetric: bool) -> None:
    weight, bias = random(*SHAPE, dtype=dtype), random(SHAPE[0], seed=1)
    (made,) = backend.quantize({"fc1": weight}, None, settings_of("int8"))
    how = Int8Format(symmetric)
    check_layout("int8", made.tensors, SHAPE, how)
    back = backend.dequantize(made.tensors, SHAPE, how)
    assert ((back - weight.float()).abs() <= made.tensors["weight_scale"] * 0.5001).all()
    assert made.facts["relative_error"] == pytest.approx(
        ((back - weight.float()).norm() / weight.float().norm()).item()
    )
    module = backend.module(made.tensors, bias, SHAPE, how, torch.float32).eval()
    x = torch.cat(
        [
            random(6, SHAPE[1], seed=2) + 0.3,
            torch.zeros(1, SHAPE[1]),
            random(1, SHAPE[1]).abs(),
            -random(1, SHAPE[1]).abs(),
        ]
    )
    expected = emulated(x, made.tensors["weight"], made.tensors["weight_scale"], bias, symmetric)
    assert ((module(x).double() - expected).abs().max() / expected.abs().max()) < TOLERANCE
    check_gradients(module, back, SHAPE[1])


@pytest.mark.parametrize("float_input", [False, True])
def test_under_autocast_the_input_is_its_dtype(float_input: bool) -> None:
    """On GPUs norms answer in float32 under autocast."""
    (made,) = backend.quantize({"fc1": random(*SHAPE)}, None, settings_of("int8"))
    module = backend.module(made.tensors, None, SHAPE, Int8Format(True, float_input), torch.float32).eval()
    x = random(3, SHAPE[1])
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, module(x.bfloat16()))


def test_state_dict_is_the_file() -> None:
    (made,) = backend.quantize({"fc1": random(*SHAPE)}, None, settings_of("int8"))
    module = backend.module(made.tensors, random(SHAPE[0]), SHAPE, Int8Format(), torch.float32)
    state = module.state_dict()
    assert set(state) == {*made.tensors, "bias"}
    for name, tensor in made.tensors.items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype
    module.to(torch.bfloat16)
    assert (module.weight.dtype, module.weight_scale.dtype, module.row_sum.dtype) == (
        torch.int8,
        torch.float32,
        torch.int32,
    )
    assert module.bias.dtype == torch.bfloat16
    assert torch.equal(module.weight_scale, made.tensors["weight_scale"])
    assert module(random(2, SHAPE[1]).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_input_as_it_is(dtype: torch.dtype) -> None:
    """The product with the weight that the tensors stand for, and nothing else: no rounding of x."""
    weight, bias = random(*SHAPE), random(SHAPE[0], seed=1)
    settings = settings_of("int8", input_16bit=["*.fc1"])
    (made,) = backend.quantize({"fc1": weight}, None, settings)
    assert made.facts["activations"] == "float"
    how = backend.format(settings, dtype)
    assert how == Int8Format(float_input=True)
    module = backend.module(made.tensors, bias, SHAPE, how, dtype).eval()
    assert module.activation_format() == "float"
    x = random(9, SHAPE[1], seed=2)
    x[:, 5] *= 1000  # an outlier, beside which int8 would lose the others
    x = x.to(dtype)
    back = backend.dequantize(made.tensors, SHAPE, how)
    expected = x.double() @ back.double().T + bias.to(dtype).double()
    step = torch.finfo(dtype).eps
    assert ((module(x).double() - expected).abs().max() / expected.abs().max()) < 4 * step
    if dtype == torch.float32:
        check_gradients(module, back, SHAPE[1])
        rounded = backend.module(made.tensors, bias, SHAPE, Int8Format(), dtype).eval()
        assert (rounded(x) - module(x)).norm() > 100 * (module(x) - expected).norm()


@pytest.mark.parametrize("changes", [{}, {"compensate": True, "sweeps": 2}], ids=["plain", "calibrated"])
def test_one_input(changes: dict[str, Any]) -> None:
    weight = torch.cat([random(8, 1), torch.zeros(1, 1)])
    statistics = Statistics(torch.full((1, 1), 3.0), 5) if changes else None
    (made,) = backend.quantize({"fc1": weight}, statistics, settings_of("int8", **changes))
    assert made.tensors["weight"].abs().flatten().tolist() == [127] * 8 + [0]
    assert torch.allclose(backend.dequantize(made.tensors, (9, 1), Int8Format()), weight, rtol=1e-6)
    assert made.facts["relative_error"] < 1e-6


def test_outliers_are_on_record() -> None:
    weight, H, absmax = random(*SHAPE), torch.eye(SHAPE[1]), torch.ones(SHAPE[1])
    absmax[[7, 2]] = torch.tensor([50.0, 30.0])
    (made,) = backend.quantize({"fc1": weight}, Statistics(H, 9, absmax=absmax), settings_of("int8", compensate=True))
    assert made.facts["activations"] == "int8 per token"
    assert made.facts["largest_over_median_input"] == 50
    assert (made.facts["outlier_inputs"], made.facts["outliers"]) == (2, [7, 2])
    (plain,) = backend.quantize({"fc1": weight}, None, settings_of("int8"))
    assert "outliers" not in plain.facts


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_names_its_layer(value: float) -> None:
    weight = random(*SHAPE)
    weight[5, 7] = value
    with pytest.raises(DataError, match=r"^layers\.0\.fc2\.weight: "):
        backend.quantize({"layers.0.fc1": random(*SHAPE), "layers.0.fc2": weight}, None, settings_of("int8"))


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-30, 1e30])
def test_unusual_weights_give_no_nan(size: float) -> None:
    weight = random(*SHAPE)
    weight[3:9] *= size
    (made,) = backend.quantize({"fc1": weight}, None, settings_of("int8"))
    assert all(t.float().isfinite().all() for t in made.tensors.values())
    module = backend.module(made.tensors, None, SHAPE, Int8Format(), torch.float32)
    out = module(random(2, SHAPE[1]))
    assert out.isfinite().all()
    if size == 0:
        assert (out[:, 3:9] == 0).all()


LINEARS = ["model.decoder.project_in", "model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2", "lm_head"]
CONFIG: dict[str, Any] = backend.describe(
    {"model.decoder.project_in": Int8Format(), "model.decoder.layers.0.fc1": Int8Format()},
    ["model.decoder.layers.0.fc2", "lm_head"], torch.float16,
).quantization_config or {}  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
def test_describe_and_read(symmetric: bool) -> None:
    scheme = dict.fromkeys(LINEARS[:2], Int8Format(symmetric))
    config = backend.describe(scheme, LINEARS[2:], torch.float16).quantization_config
    assert config is not None
    assert backend_of(config) is BACKENDS["int8"]
    assert backend.read(config, LINEARS, torch.float16) == scheme


SCHEME = {
    LINEARS[0]: Int8Format(),
    LINEARS[1]: Int8Format(float_input=True),
    LINEARS[2]: Int8Format(float_input=True),
}


class TestInputsAsTheyAre:
    """Config groups of their own."""

    def test_some(self) -> None:
        config = backend.describe(SCHEME, LINEARS[3:], torch.float16).quantization_config
        assert config is not None
        assert backend.read(config, LINEARS, torch.float16) == SCHEME
        groups = QuantizationConfig.model_validate(config).config_groups
        assert [group.targets for group in groups.values()] == [["Linear"], LINEARS[1:3]]
        assert [group.input_activations is None for group in groups.values()] == [False, True]
        assert groups["group_1"].format == "int-quantized"

    def test_all(self) -> None:
        scheme = dict.fromkeys(LINEARS[:2], Int8Format(float_input=True))
        config = backend.describe(scheme, LINEARS[2:], torch.float16).quantization_config
        assert config is not None
        assert backend.read(config, LINEARS, torch.float16) == scheme
        (group,) = QuantizationConfig.model_validate(config).config_groups.values()
        assert (group.targets, group.input_activations) == (["Linear"], None)

    @pytest.mark.parametrize(
        "targets",
        [["re:.*fc1"], ["no.such.linear"], [LINEARS[1], LINEARS[1], "x"], [], None, "Linear", ["Linear"], [3], ["Linear", LINEARS[1]]],
        ids=str,
    )  # fmt: skip
    def test_other_targets_are_refused(self, targets: Any) -> None:
        config = copy.deepcopy(backend.describe(SCHEME, LINEARS[3:], torch.float16).quantization_config)
        assert config is not None
        config["config_groups"]["group_1"]["targets"] = targets
        with pytest.raises(DataError, match=r"quantization_config: .*targets"):
            backend.read(config, LINEARS, torch.float16)

    def test_a_name_in_two_groups(self) -> None:
        config = copy.deepcopy(backend.describe(SCHEME, LINEARS[3:], torch.float16).quantization_config)
        assert config is not None
        config["config_groups"]["group_2"] = config["config_groups"]["group_1"]
        with pytest.raises(DataError, match=r"targets .* each once"):
            backend.read(config, LINEARS, torch.float16)

    def test_no_group_for_the_others(self) -> None:
        config = copy.deepcopy(backend.describe(SCHEME, LINEARS[3:], torch.float16).quantization_config)
        assert config is not None
        del config["config_groups"]["group_0"]
        with pytest.raises(DataError, match=r"no group of config_groups has the targets \['Linear'\]"):
            backend.read(config, LINEARS, torch.float16)


def test_a_head_is_never_quantized() -> None:
    # A new head on a quantized model, and GPT-NeoX's head under its published name, which older tools ignore it by.
    scheme = backend.read({**CONFIG, "ignore": ["embed_out"]}, [*LINEARS, "score"], torch.float16)
    assert set(scheme) == set(LINEARS[:3])


def test_compressed_tensors_reads_it() -> None:
    read = QuantizationConfig.model_validate(CONFIG)
    (scheme,) = read.config_groups.values()
    assert (scheme.weights.num_bits, scheme.weights.strategy, scheme.weights.symmetric) == (8, "channel", True)
    assert (scheme.input_activations.strategy, scheme.input_activations.dynamic, scheme.input_activations.symmetric) == (
        "token", True, False
    )  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *parents, leaf = path.split("/")
    place = config
    for key in parents:
        place = place[key]
    place[leaf] = value
    return config


GROUP = "config_groups/group_0"
HOSTILE = [
    ("format", "pack-quantized"), ("format", None), ("format", ["int-quantized"]), ("config_groups", {}), ("config_groups", None), (f"{GROUP}/format", "pack-quantized"),
    ("config_groups", [1]), ("config_groups", "x"), ("config_groups", {"a": 1}), ("config_groups", {"a": {}, "b": {}}),
    (f"{GROUP}/weights", None), (f"{GROUP}/weights", 8), (f"{GROUP}/input_activations", 8), (f"{GROUP}/input_activations", []),
    (f"{GROUP}/weights/num_bits", 4), (f"{GROUP}/weights/strategy", "group"), (f"{GROUP}/weights/symmetric", False),
    (f"{GROUP}/weights/type", "float"), (f"{GROUP}/weights/dynamic", True), (f"{GROUP}/input_activations/strategy", "tensor"),
    (f"{GROUP}/input_activations/dynamic", False), (f"{GROUP}/input_activations/dynamic", "local"),
    (f"{GROUP}/input_activations/num_bits", 4), (f"{GROUP}/input_activations/symmetric", "no"),
    (f"{GROUP}/output_activations", {"num_bits": 8}), (f"{GROUP}/targets", ["re:.*"]), (f"{GROUP}/targets", None),
    ("ignore", ["re:.*fc1"]), ("ignore", [1]), ("ignore", "lm_head"), ("ignore", {"lm_head": 1}), ("kv_cache_scheme", {"num_bits": 8}),
    ("transform_config", {"config_groups": {"a": 1}}), ("sparsity_config", {"format": "sparse-24-bitmask"}),
    ("sparsity_config", [1]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), HOSTILE, ids=[f"{p}={v}" for p, v in HOSTILE])
def test_other_configs_are_refused(path: str, value: Any) -> None:
    with pytest.raises(DataError, match="quantization_config"):
        backend.read(changed(path, value), LINEARS, torch.float16)


@pytest.mark.parametrize("method", [None, 3, ["gptq"], {"a": 1}, "awq", "fp8", ""])
def test_other_methods_are_refused(method: Any) -> None:
    with pytest.raises(DataError, match="quant_method"):
        backend_of({"quant_method": method})
