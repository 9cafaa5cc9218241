"""GPTQ's tensors, modules, `quantize_config.json` and dynamic rules; readers of v1, v2 and desc_act against a bit-by-bit writer."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from qlm.backends import BACKENDS, Statistics, backend_of
from qlm.backends.gptq import GptqBackend, GptqFormat
from qlm.errors import DataError, UsageError
from tests.backends.conftest import check_gradients, check_layout, check_output, random, settings_of

backend = GptqBackend()
SHAPE = (64, 128)
BITS = (2, 3, 4, 8)
# Relative to the largest output: float32 sums of 128 products in another order.
TOLERANCE = 2e-6


def pack_bit_by_bit(codes: Tensor, bits: int) -> Tensor:
    """int32 [N bits / 32, M] from codes [N, M]: code n's bit b is bit (n bits + b) of its column's stream of little-endian words."""
    stream = torch.zeros(codes.shape[0] * bits, codes.shape[1], dtype=torch.int64)
    for n in range(codes.shape[0]):
        for b in range(bits):
            stream[n * bits + b] = (codes[n].long() >> b) & 1
    words = (stream.view(-1, 32, codes.shape[1]) << torch.arange(32)[None, :, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def written_elsewhere(
    shape: tuple[int, int], bits: int, group_size: int, v2: bool, permuted: bool, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a GPTQ linear by a writer of the test's own, and the weight that they stand for in float64."""
    O, I = shape
    generator = torch.Generator().manual_seed(seed)
    groups = I // group_size
    codes = torch.randint(0, 2**bits, (I, O), generator=generator)
    zeros = torch.randint(0 if v2 else 1, 2**bits, (groups, O), generator=generator)
    scales = (torch.rand(groups, O, generator=generator) * 0.02 + 0.001).half()
    g_idx = torch.arange(I) // group_size
    if permuted:
        g_idx = g_idx[torch.randperm(I, generator=generator)]
    weight = (scales.double()[g_idx] * (codes - zeros[g_idx]).double()).T
    tensors = {
        "qweight": pack_bit_by_bit(codes, bits),
        "qzeros": pack_bit_by_bit((zeros if v2 else zeros - 1).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": g_idx.to(torch.int32),
    }
    return tensors, weight


@pytest.mark.parametrize("order", ["none", "act", "gar"])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_from_weight_to_output(bits: int, symmetric: bool, group_size: int, order: str) -> None:
    weight, bias, x = random(*SHAPE), random(SHAPE[0], seed=1), random(256, SHAPE[1], seed=2)
    settings = settings_of("gptq", bits=bits, symmetric=symmetric, group_size=group_size, order=order)
    backend.check("fc1", SHAPE, settings)
    (made,) = backend.quantize({"fc1": weight}, Statistics(x.T @ x / 256, 256), settings)
    how = backend.format(settings, torch.float16)
    check_layout("gptq", made.tensors, SHAPE, how)
    back = backend.dequantize(made.tensors, SHAPE, how)
    assert (back - weight).norm() / weight.norm() < {2: 0.8, 3: 0.4, 4: 0.2, 8: 0.02}[bits]
    module = backend.module(made.tensors, bias, SHAPE, how, torch.float32).eval()
    expected = linear(x.double(), back.double(), bias.double())
    check_output(module, x, expected, TOLERANCE)
    # The order of the inputs' groups in the file says whether desc_act is needed.
    assert how.desc_act or torch.equal(made.tensors["g_idx"].diff(), made.tensors["g_idx"].diff().clamp(min=0))


def test_gradients() -> None:
    tensors, weight = written_elsewhere(SHAPE, 4, 32, False, True)
    module = backend.module(tensors, random(SHAPE[0]), SHAPE, GptqFormat(4, 32), torch.float32)
    check_gradients(module, weight.float(), SHAPE[1])


def test_under_autocast_the_input_is_its_dtype() -> None:
    """On GPUs norms answer in float32 under autocast, and a product in float32 takes no tensor cores."""
    tensors, _ = written_elsewhere(SHAPE, 4, 32, False, True)
    module = backend.module(tensors, random(SHAPE[0]), SHAPE, GptqFormat(4, 32), torch.float32)
    x = random(3, SHAPE[1])
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, module(x.bfloat16()))


def test_state_dict_is_the_file() -> None:
    tensors, _ = written_elsewhere(SHAPE, 4, 32, False, False)
    module = backend.module(tensors, random(SHAPE[0]), SHAPE, GptqFormat(4, 32), torch.float32)
    for _ in range(2):
        state = module.state_dict()
        assert set(state) == {*tensors, "bias"}
        for name, tensor in tensors.items():
            assert torch.equal(state[name], tensor)
            assert state[name].dtype == tensor.dtype
        module.to(torch.bfloat16)
    assert module.bias.dtype == torch.bfloat16
    assert module(random(2, SHAPE[1]).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("permuted", [False, True], ids=["groups", "desc_act"])
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", BITS)
def test_reads_what_others_write(bits: int, v2: bool, permuted: bool) -> None:
    tensors, weight = written_elsewhere(SHAPE, bits, 32, v2, permuted, seed=bits)
    how = GptqFormat(bits, 32, False, permuted, v2)
    check_layout("gptq", tensors, SHAPE, how)
    assert torch.equal(backend.dequantize(tensors, SHAPE, how), weight.float())
    x = random(5, SHAPE[1])
    expected = linear(x.double(), weight)
    check_output(backend.module(tensors, None, SHAPE, how, torch.float32), x, expected, TOLERANCE)


@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_group_index_out_of_range(wrong: int) -> None:
    tensors, _ = written_elsewhere(SHAPE, 4, 32, False, False)
    tensors["g_idx"][77] = wrong
    with pytest.raises(DataError, match="g_idx holds"):
        backend.module(tensors, None, SHAPE, GptqFormat(4, 32), torch.float32)


@pytest.mark.parametrize(
    ("shape", "changes", "words"),
    [((64, 100), {"group_size": 32}, "does not divide the 100 inputs of layers.0.fc1"),
     ((64, 64), {"group_size": 128}, "does not divide"), ((64, 48), {"group_size": -1, "bits": 3}, "48 inputs"),
     ((40, 64), {"group_size": 32, "bits": 3}, "40 outputs"), ((12, 64), {"group_size": 32, "bits": 4}, "12 outputs"),
     ((24, 64), {"group_size": 32, "bits": 2}, "24 outputs"), ((6, 64), {"group_size": 32, "bits": 8}, "6 outputs"),
     ((64, 4), {"group_size": -1, "bits": 4}, "4 inputs")],
    ids=str,
)  # fmt: skip
def test_shapes_that_cannot_be_held(shape: tuple[int, int], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        backend.check("layers.0.fc1", shape, settings_of("gptq", **changes))
    assert "\n" not in str(caught.value)


LINEARS = [
    "model.decoder.project_in", "model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1", "model.decoder.layers.11.fc1",
    "model.decoder.layers.11.fc2", "lm_head",
]  # fmt: skip
INSIDE = LINEARS[1:5]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_describe_and_read(bits: int, group_size: int, symmetric: bool, desc_act: bool) -> None:
    scheme = dict.fromkeys(INSIDE, GptqFormat(bits, group_size, symmetric, desc_act))
    description = backend.describe(scheme, [LINEARS[0], "lm_head"], torch.float16)
    config = json.loads(json.dumps(description.quantization_config))
    assert description.files == {"quantize_config.json": description.quantization_config}
    assert backend_of(config) is BACKENDS["gptq"]
    assert backend.read(config, LINEARS, torch.float16) == scheme


def test_overrides_and_skips_round_trip() -> None:
    common = GptqFormat(4, 128)
    scheme = {INSIDE[0]: GptqFormat(8, 32, False), INSIDE[1]: common, INSIDE[3]: common}
    config = backend.describe(scheme, [LINEARS[0], INSIDE[2], "lm_head"], torch.float16).quantization_config
    assert config is not None
    # Sorted keys, as a JSON writer may leave them: rules must not depend on their order.
    assert backend.read(json.loads(json.dumps(config, sort_keys=True)), LINEARS, torch.float16) == scheme


def test_rules_as_gptqmodel_has_them() -> None:
    config = {
        "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "quant_method": "gptq",
        "dynamic": {r"-:.*layers\.1\.": {}, r"+:.*fc1$": {"bits": 8}, r".*\.fc2": {"group_size": 32}, "-:.*fc1": None},
    }  # fmt: skip
    scheme = backend.read(config, LINEARS, torch.float16)
    assert scheme == {INSIDE[0]: GptqFormat(8, 128), INSIDE[2]: GptqFormat(8, 128), INSIDE[3]: GptqFormat(4, 32)}


def test_only_linears_in_blocks_are_quantized() -> None:
    # GPTQ tools leave OPT-350m's projections and every head alone without saying so.
    config = {"bits": 4, "group_size": 128}
    assert set(backend.read(config, [*LINEARS, "score"], torch.float16)) == set(INSIDE)


@pytest.mark.parametrize("inside", [[["fc1"]], ["fc1"], [["self_attn.q_proj"], ["fc1"]]], ids=str)
def test_modules_in_block_to_quantize(inside: Any) -> None:
    config = {"bits": 4, "group_size": 128, "quant_method": "gptq", "modules_in_block_to_quantize": inside}
    assert set(backend.read(config, LINEARS, torch.float16)) == set(INSIDE[:3])


def test_old_autogptq_file() -> None:
    config = {
        "bits": 4,
        "group_size": 128,
        "damp_percent": 0.01,
        "desc_act": True,
        "sym": False,
        "true_sequential": True,
    }
    assert backend_of(config) is BACKENDS["gptq"]
    assert backend.read(config, LINEARS, torch.float16) == dict.fromkeys(INSIDE, GptqFormat(4, 128, False, True))


@pytest.mark.parametrize(
    "change",
    [{"bits": 5}, {"bits": "4"}, {"bits": 4.0}, {"bits": True}, {"bits": None}, {"bits": [4]}, {"group_size": 0}, {"group_size": -2},
     {"group_size": 4}, {"group_size": "128"}, {"group_size": 128.0}, {"group_size": None}, {"group_size": True},
     {"checkpoint_format": "marlin"}, {"checkpoint_format": ["gptq"]}, {"format": "gptq_p"}, {"pack_dtype": "int16"},
     {"lm_head": True}, {"dynamic": [1]}, {"dynamic": "x"}, {"dynamic": {"a": 5}}, {"dynamic": {"+:(": {}}},
     {"dynamic": {"+:.*": {"bits": 7}}}, {"dynamic": {"+:.*": {"group_size": "x"}}}, {"modules_in_block_to_quantize": 5},
     {"modules_in_block_to_quantize": [[5]]}, {"modules_in_block_to_quantize": "fc1"}],
    ids=str,
)  # fmt: skip
def test_other_configs_are_refused(change: dict[str, Any]) -> None:
    config = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "quant_method": "gptq", **change}
    with pytest.raises(DataError, match="quantization_config") as caught:
        backend.read(config, LINEARS, torch.float16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rule",
    [
        r"+:^(a+)+$",
        r"+:(.|.)*!",
        r"+:((.+))+!",
        "+:" + ".*" * 10 + "!",
        r"-:(model\.|layers\.)*.*(x*y*)*z",
        "+:" + "a?" * 300,
    ],
)
def test_a_rule_that_could_backtrack_for_ever_is_refused(rule):
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {rule: {"bits": 8}}}
    with pytest.raises(DataError, match="could take for ever to match"):
        GptqBackend().read(config, ["model.decoder.layers.0." + "a" * 40], torch.float16)
