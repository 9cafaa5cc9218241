"""NF4: byte for byte bitsandbytes' state dict, modules that compute from the file's absmax, hostile states and configs."""

import copy
import json
import pickle
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from qlm.backends import BACKENDS, backend_of
from qlm.backends.nf4 import Nf4Backend, pack_state
from qlm.errors import DataError, UsageError
from qlm.formats.nf4 import STATE, Nf4Format, unpack_state
from qlm.kernels import cpu_ops
from qlm.kernels.ops import float_activations, nf4_linear
from qlm.numerics.nf4 import double_dequantize
from tests.backends.conftest import (
    INT8_ACTIVATIONS,
    check_gradients,
    check_layout,
    check_output,
    random,
    same_bytes,
    settings_of,
)

backend = Nf4Backend()
SHAPE = (96, 192)
# Relative to the largest output: float32 sums of 192 products in another order.
TOLERANCE = 2e-6

nested_or_not = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def quantize(weight: Tensor, double_quant: bool) -> dict[str, Tensor]:
    (made,) = backend.quantize({"fc1": weight}, None, settings_of("nf4", double_quant=double_quant))
    return made.tensors


def as_bytes(state: Tensor) -> bytes:
    return bytes(state.tolist())


def theirs(weight: Tensor, double_quant: bool) -> dict[str, Tensor]:
    """What bitsandbytes itself would write."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    return {"weight": packed, **{f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}


@DTYPES
@nested_or_not
@pytest.mark.parametrize("shape", [SHAPE, (1, 64), (7, 64), (300, 128)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-6, 0.0])
def test_bytes_are_bitsandbytes(dtype: torch.dtype, double_quant: bool, shape: tuple[int, int], size: float) -> None:
    weight = (random(*shape) * size).to(dtype)
    ours, expected = quantize(weight, double_quant), theirs(weight, double_quant)
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        if name == STATE:
            assert bytes(ours[name].tolist()) == bytes(tensor.tolist()), "the JSON itself, order and spaces included"
        else:
            assert same_bytes(ours[name], tensor), name


@nested_or_not
@DTYPES
def test_from_weight_to_output(dtype: torch.dtype, double_quant: bool) -> None:
    tensors, bias = quantize(random(*SHAPE, dtype=dtype), double_quant), random(SHAPE[0], seed=1)
    how = Nf4Format(double_quant, "float32")
    check_layout("nf4", tensors, SHAPE, how)
    back = backend.dequantize(tensors, SHAPE, how)
    module = backend.module(tensors, bias, SHAPE, how, torch.float32).eval()
    x = random(5, SHAPE[1], seed=2)
    expected = linear(x.double(), back.double(), bias.double())
    for _ in range(2):  # bitsandbytes' repacking would happen in the first pass
        check_output(module, x, expected, TOLERANCE)
    check_gradients(module, back, SHAPE[1])


def module_of(
    weight: Tensor, double_quant: bool, dtype: torch.dtype = torch.float32, bias: Tensor | None = None
) -> Any:
    tensors = quantize(weight, double_quant)
    return backend.module(tensors, bias, SHAPE, Nf4Format(double_quant, "float32"), dtype).eval()


needs_kernels = pytest.mark.skipif(cpu_ops.native() is None, reason="the CPU kernels are not installed")


@needs_kernels
@nested_or_not
@DTYPES
@torch.no_grad()
def test_a_pass_on_a_cpu_is_the_op(dtype: torch.dtype, double_quant: bool) -> None:
    weight, bias, x = random(*SHAPE), random(SHAPE[0], seed=1), random(2, 3, SHAPE[1], seed=2)
    tensors = quantize(weight, double_quant)
    absmax = tensors["weight.absmax"]
    if double_quant:
        offset = unpack_state(as_bytes(tensors[STATE]))["nested_offset"]
        absmax = double_dequantize(absmax, tensors["weight.nested_absmax"], offset)
    module = module_of(weight, double_quant, dtype, bias)
    assert isinstance(module, bitsandbytes.nn.Linear4bit)
    expected = nf4_linear(
        x.to(dtype), tensors["weight"], absmax, bias.to(dtype), out_features=SHAPE[0], in_features=SHAPE[1]
    )
    for given in (torch.float32, dtype):
        out = module(x.to(dtype).to(given))
        assert type(out) is Tensor
        assert same_bytes(out, expected.to(given))
    assert module.activation_format() == "int8 in groups of 64"
    with float_activations():
        assert not torch.equal(module(x), expected)
        assert module.activation_format() == "float"


@needs_kernels
@nested_or_not
def test_copies_and_pickles(double_quant: bool) -> None:
    module, x = module_of(random(*SHAPE), double_quant), random(4, SHAPE[1])
    expected = module(x)
    pickled = pickle.dumps(module)
    assert b"_operands" not in pickled
    for other in (copy.deepcopy(module), pickle.loads(pickled)):
        assert torch.equal(other(x), expected)
        other.weight.data.zero_()
        assert torch.equal(module(x), expected)


@needs_kernels
@nested_or_not
def test_another_weight_is_noticed(double_quant: bool) -> None:
    """As PEFT puts one there when it merges an adapter."""
    module, x = module_of(random(*SHAPE), double_quant), random(4, SHAPE[1])
    module(x)
    weight = random(*SHAPE, seed=5)
    module.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=double_quant
    ).to("cpu")
    assert torch.equal(module(x), module_of(weight, double_quant)(x))
    other = (module.weight.as_subclass(Tensor) ^ 0x11).contiguous()
    module.weight = bitsandbytes.nn.Params4bit(
        other, requires_grad=False, quant_state=module.weight.quant_state, bnb_quantized=True, module=module
    )
    with float_activations():
        exact = module(x)
    assert (module(x) - exact).norm() / exact.norm() < INT8_ACTIVATIONS
    module.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="fp4").to("cpu")
    assert module.activation_format() == "float"
    assert (module(x) - linear(x, weight)).norm() / linear(x, weight).norm() < 0.2


@nested_or_not
@torch.no_grad()
def test_a_repacked_weight_is_bitsandbytes_own(double_quant: bool) -> None:
    module, x = module_of(random(*SHAPE), double_quant), random(4, SHAPE[1])
    expected = module(x)
    module.support_avx512bf16_for_cpu = bitsandbytes.nn.modules.has_avx512bf16()
    if not module.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes does not repack on this CPU")
    with float_activations():
        module(x)
    assert module.activation_format() == "float"
    assert (module(x) - expected).norm() / expected.norm() < 0.02  # bf16


@pytest.mark.parametrize("fullgraph", [False, True])
@nested_or_not
def test_compiled(double_quant: bool, fullgraph: bool) -> None:
    torch._dynamo.reset()
    module, x = module_of(random(*SHAPE), double_quant), random(4, SHAPE[1]).requires_grad_()
    expected = module(x)
    compiled = torch.compile(module, fullgraph=fullgraph, backend="aot_eager")
    out = compiled(x)
    out.sum().backward()
    assert torch.allclose(out, expected, atol=1e-4)
    weight = backend.dequantize(quantize(random(*SHAPE), double_quant), SHAPE, Nf4Format(double_quant, "float32"))
    assert torch.allclose(x.grad, weight.sum(0).expand(4, -1), atol=1e-4)


@nested_or_not
@DTYPES
def test_state_dict_is_the_file_also_after_a_pass(dtype: torch.dtype, double_quant: bool) -> None:
    tensors = quantize(random(*SHAPE, dtype=dtype), double_quant)
    how = Nf4Format(double_quant, str(dtype).removeprefix("torch."))
    module = backend.module(tensors, None, SHAPE, how, dtype).eval()
    for _ in range(2):
        state = module.state_dict()
        assert set(state) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(state[name], tensor), name
            assert state[name].dtype == tensor.dtype, name
        with torch.no_grad():
            module(random(3, SHAPE[1], dtype=dtype))


@nested_or_not
def test_another_dtype_changes_only_what_it_says(double_quant: bool) -> None:
    tensors = quantize(random(*SHAPE, dtype=torch.float16), double_quant)
    state = backend.module(tensors, None, SHAPE, Nf4Format(double_quant, "float16"), torch.float32).state_dict()
    assert {**unpack_state(as_bytes(state.pop(STATE))), "dtype": "float16"} == unpack_state(as_bytes(tensors[STATE]))
    for name, tensor in state.items():
        assert torch.equal(tensor, tensors[name]), name


@nested_or_not
def test_to_bfloat16_keeps_scales(double_quant: bool) -> None:
    tensors = quantize(random(*SHAPE), double_quant)
    module = backend.module(tensors, random(SHAPE[0]), SHAPE, Nf4Format(double_quant, "float32"), torch.float32).eval()
    module.to(torch.bfloat16)
    state = module.state_dict()
    for name in tensors:
        if name != STATE:
            assert state[name].dtype == tensors[name].dtype, name
            assert torch.equal(state[name], tensors[name]), name
    assert module(random(2, SHAPE[1]).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_names_its_layer(value: float) -> None:
    weight = random(*SHAPE)
    weight[5, 7] = value
    with pytest.raises(DataError, match=r"^layers\.0\.fc2\.weight: "):
        backend.quantize({"layers.0.fc1": random(*SHAPE), "layers.0.fc2": weight}, None, settings_of("nf4"))


@nested_or_not
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-30, 1e30])
def test_unusual_weights_give_no_nan(size: float, double_quant: bool) -> None:
    weight = random(*SHAPE)
    weight[3:9] *= size
    tensors = quantize(weight, double_quant)
    assert all(t.float().isfinite().all() for t in tensors.values())
    assert backend.dequantize(tensors, SHAPE, Nf4Format(double_quant, "float32")).isfinite().all()


def test_inputs_that_are_no_whole_blocks() -> None:
    with pytest.raises(UsageError, match=r"layers\.0\.fc1 has 100 inputs"):
        backend.check("layers.0.fc1", (64, 100), settings_of("nf4"))
    backend.check("layers.0.fc1", (5, 128), settings_of("nf4"))


BROKEN_STATES = [
    {"quant_type": "fp4"}, {"blocksize": 128}, {"shape": [192, 96]}, {"shape": None}, {"nested_blocksize": 128},
    {"nested_dtype": "float16"}, {"nested_offset": None}, {"nested_offset": "0.1"}, {"nested_offset": float("nan")},
    {"nested_offset": float("inf")}, {"nested_offset": 1e300},
]  # fmt: skip


@pytest.mark.parametrize("change", BROKEN_STATES, ids=str)
def test_broken_states_are_refused(change: dict[str, Any]) -> None:
    tensors = quantize(random(*SHAPE), True)
    tensors[STATE] = pack_state({**unpack_state(as_bytes(tensors[STATE])), **change})
    with pytest.raises(DataError, match=next(iter(change))):
        backend.module(tensors, None, SHAPE, Nf4Format(True, "float32"), torch.float32)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b" " * 5000 + b"{}", b"[" * 4000], ids=lambda r: repr(r[:5])
)
def test_states_that_are_no_json_objects(raw: bytes) -> None:
    with pytest.raises(DataError, match="not a bitsandbytes quantization state"):
        unpack_state(raw)


def test_other_tables_are_refused() -> None:
    for name in ("weight.quant_map", "weight.nested_quant_map"):
        tensors = quantize(random(*SHAPE), True)
        tensors[name] = tensors[name] * 1.01
        with pytest.raises(DataError, match=name):
            backend.module(tensors, None, SHAPE, Nf4Format(True, "float32"), torch.float32)


LINEARS = [
    "model.decoder.project_in",
    "model.decoder.layers.0.fc1",
    "model.decoder.layers.1.fc1",
    "model.decoder.layers.11.fc1",
    "lm_head",
]


@nested_or_not
def test_describe_and_read(double_quant: bool) -> None:
    scheme = dict.fromkeys([LINEARS[0], LINEARS[1], LINEARS[3]], Nf4Format(double_quant, "float16"))
    config = backend.describe(scheme, [LINEARS[2], "lm_head"], torch.float16).quantization_config
    assert config is not None
    assert backend_of(config) is BACKENDS["nf4"]
    assert config["llm_int8_skip_modules"] == [LINEARS[2], "lm_head", "score", "classifier", "qa_outputs"]
    assert backend.read(config, LINEARS, torch.float16) == scheme
    # As qlm wrote it before it named the heads of tasks.
    former = {**config, "llm_int8_skip_modules": [LINEARS[2], "lm_head"]}
    assert backend.read(former, LINEARS, torch.float16) == scheme
    from transformers import BitsAndBytesConfig

    read = BitsAndBytesConfig.from_dict(json.loads(json.dumps(config)))
    assert (read.bnb_4bit_quant_type, read.bnb_4bit_use_double_quant, read.load_in_4bit) == ("nf4", double_quant, True)


@pytest.mark.parametrize("skip", [None, [], ["lm_head"], ["embed_out"]], ids=str)
def test_a_head_is_never_quantized(skip: list[str] | None) -> None:
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": skip}
    assert set(backend.read(config, [*LINEARS, "score"], torch.float16)) == set(LINEARS[:-1])


@pytest.mark.parametrize(
    "change",
    [{"load_in_4bit": False, "_load_in_4bit": False}, {"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_quant_type": None},
     {"bnb_4bit_quant_type": ["nf4"]}, {"bnb_4bit_quant_storage": "int8"}, {"llm_int8_skip_modules": "lm_head"},
     {"llm_int8_skip_modules": [3]}, {"llm_int8_skip_modules": {"a": 1}}, {"bnb_4bit_use_double_quant": "no"}],
    ids=str,
)  # fmt: skip
def test_other_configs_are_refused(change: dict[str, Any]) -> None:
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **change}
    with pytest.raises(DataError, match="quantization_config"):
        backend.read(config, LINEARS, torch.float16)
