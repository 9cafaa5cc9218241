"""The formats' numpy side against the torch side of backends and numerics, and what hostile files get."""

import json

import numpy as np
import pytest
import torch

from qlm.backends import BACKENDS, backend_of
from qlm.errors import DataError
from qlm.formats import FORMATS, QUANT_METHODS, format_of, gptq, nf4
from qlm.formats.dtypes import DTYPES, FLOATS, NUMPY_DTYPES, dtype_name, to_float32, torch_dtype
from qlm.formats.gptq import GptqFormat
from qlm.formats.nf4 import STATE, Nf4Format
from qlm.numerics.nf4 import codebook, dynamic_map
from qlm.numerics.packing import decode_zero_points, pack_columns, unpack_rows
from tests.backends.conftest import random, settings_of

SHAPE = (96, 192)


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_are_the_same_everywhere(name: str) -> None:
    dtype = torch_dtype(name)
    assert dtype_name(dtype) == name
    assert DTYPES[name] == dtype.itemsize == NUMPY_DTYPES[name].itemsize
    assert (name in FLOATS) == (dtype in (torch.float16, torch.bfloat16, torch.float32))
    if name not in ("BF16", "F8_E4M3"):
        assert torch.zeros(1, dtype=dtype).numpy().dtype == NUMPY_DTYPES[name]


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_to_float32_is_exact(name: str) -> None:
    tensor = torch.cat([random(1000), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-7])]).to(torch_dtype(name))
    stored = tensor.view(torch.uint16).numpy() if name == "BF16" else tensor.numpy()
    found = to_float32(stored, name)
    assert found.dtype == np.float32
    assert found.tobytes() == tensor.float().numpy().tobytes()


def test_registries_agree() -> None:
    assert set(FORMATS) == set(QUANT_METHODS.values()) == set(BACKENDS) - {"quanto"}
    for method, name in QUANT_METHODS.items():
        assert format_of({"quant_method": method}) == name
        assert backend_of({"quant_method": method}) is BACKENDS[name]
    assert format_of({"bits": 4}) == "gptq"
    for config in ({}, {"quant_method": "quanto"}, {"quant_method": 3}, {"quant_method": ["gptq"]}):
        with pytest.raises(DataError, match="qlm reads bitsandbytes, compressed-tensors, gptq"):
            format_of(config)


class TestNf4:
    def test_tables(self) -> None:
        assert np.array_equal(np.array(nf4.CODEBOOK, np.float32), codebook().numpy())
        # Half a step of float32 at 1: the same numbers, rounded in another order.
        np.testing.assert_allclose(nf4.dynamic_map(), dynamic_map().numpy(), rtol=0, atol=6e-8)

    @pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
    def test_unpack(self, double_quant: bool) -> None:
        (made,) = BACKENDS["nf4"].quantize({"fc1": random(*SHAPE)}, None, settings_of("nf4", double_quant=double_quant))
        how = Nf4Format(double_quant, "float32")
        given = arrays(made.tensors)
        weights = nf4.unpack(given, SHAPE, how)
        assert weights.weight is given["weight"]
        if double_quant:
            assert weights.absmax is None
            assert weights.absmax_code is not None
            assert weights.nested_code is not None
            assert weights.nested_absmax is not None
            nested = np.repeat(weights.nested_absmax, weights.nested_block)[: weights.absmax_code.size]
            absmax = weights.nested_code[weights.absmax_code] * nested + np.float32(weights.nested_offset)
        else:
            assert weights.absmax is not None
            assert weights.absmax_code is weights.nested_code is weights.nested_absmax is None
            absmax = weights.absmax
        codes = np.stack([weights.weight >> 4, weights.weight & 15], axis=1).reshape(-1, weights.block)
        found = (np.array(nf4.CODEBOOK, np.float32)[codes] * absmax[:, None]).reshape(SHAPE)
        expected = BACKENDS["nf4"].dequantize(made.tensors, SHAPE, how).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize(
        ("name", "change", "words"),
        [
            (STATE, {"blocksize": 128}, "blocksize is 128, expected 64"),
            (STATE, {"quant_type": "fp4"}, "quant_type is 'fp4'"),
            (STATE, {"shape": [192, 96]}, "shape is"),
            (STATE, {"nested_offset": None}, "nested_offset is None, expected a number"),
            (STATE, {"nested_offset": 1e300}, "nested_offset is 1e"),
            (STATE, {"nested_blocksize": 128}, "nested_blocksize is 128"),
            ("weight.quant_map", None, "not the NF4 table"),
            ("weight.nested_quant_map", None, "not bitsandbytes' dynamic map"),
        ],
    )
    def test_other_methods_are_refused(self, name: str, change: dict | None, words: str) -> None:
        (made,) = BACKENDS["nf4"].quantize({"fc1": random(*SHAPE)}, None, settings_of("nf4", double_quant=True))
        tensors = arrays(made.tensors)
        if change is None:
            tensors[name] = tensors[name] + np.float32(1e-3)
        else:
            state = {**json.loads(tensors[name].tobytes()), **change}
            tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        with pytest.raises(DataError, match=words):
            nf4.unpack(tensors, SHAPE, Nf4Format(True, "float32"))


class TestGptq:
    @pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
    @pytest.mark.parametrize(
        ("bits", "outputs"), [(2, 16), (2, 48), (3, 32), (3, 96), (4, 8), (4, 40), (8, 4), (8, 36)]
    )
    def test_zero_points(self, bits: int, v2: bool, outputs: int) -> None:
        stored = torch.randint(0, 2**bits, (5, outputs), generator=torch.Generator().manual_seed(bits))
        qzeros = pack_columns(stored, bits)
        expected = decode_zero_points(qzeros, bits, "gptq_v2" if v2 else "gptq")
        found = gptq.decode_zero_points(qzeros.numpy(), bits, v2)
        assert (found.dtype, found.shape) == (np.uint8, (5, outputs))
        assert np.array_equal(found, expected.numpy())
        # A column that is not contiguous, as a view of a map may be.
        strided = np.asfortranarray(qzeros.numpy())
        assert np.array_equal(gptq.decode_zero_points(strided, bits, v2), expected.numpy())

    @pytest.mark.parametrize("bits", gptq.BITS)
    @pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
    def test_unpack(self, bits: int, act_order: bool) -> None:
        inputs, outputs, groups = 128, 64, 4
        chance = torch.Generator().manual_seed(1)
        g_idx = torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
        if act_order:
            g_idx = g_idx[torch.randperm(inputs, generator=chance)]
        tensors = {
            "qweight": torch.randint(-(2**31), 2**31 - 1, (inputs * bits // 32, outputs), generator=chance).int(),
            "qzeros": torch.randint(-(2**31), 2**31 - 1, (groups, outputs * bits // 32), generator=chance).int(),
            "scales": torch.rand(groups, outputs, generator=chance).half(),
            "g_idx": g_idx,
        }
        how = GptqFormat(bits, inputs // groups)
        weights = gptq.unpack(arrays(tensors), (outputs, inputs), how)
        assert weights.group_size == inputs // groups
        assert (weights.order is not None) == act_order
        order = np.arange(inputs) if weights.order is None else weights.order
        assert order.dtype == (np.int32 if act_order else np.int64)
        codes = unpack_rows(tensors["qweight"], bits).numpy().astype(np.float32)[order]
        scale = np.repeat(weights.scales.astype(np.float32), weights.group_size, axis=0)
        zero = np.repeat(weights.zero_point.astype(np.float32), weights.group_size, axis=0)
        found = np.empty((outputs, inputs), np.float32)
        found[:, order] = ((codes - zero) * scale).T
        assert np.array_equal(found, BACKENDS["gptq"].dequantize(tensors, (outputs, inputs), how).numpy())

    def test_order_is_stable(self) -> None:
        order = gptq.order_of(np.array([1, 0, 1, 0, 2, 2], np.int32), 3)
        assert order is not None
        assert order.tolist() == [1, 3, 0, 2, 4, 5]
        assert gptq.order_of(np.zeros(6, np.int32), 1) is None

    @pytest.mark.parametrize(
        ("g_idx", "groups", "words"),
        [
            ([0, 0, 1, -1], 2, "g_idx holds -1 to 1, but there are 2 groups"),
            ([0, 0, 1, 2], 2, "g_idx holds 0 to 2, but there are 2 groups"),
            ([0, 0, 0, 1], 2, "gives group 0 3 of 4 in features; .* 2 groups of equal size; .*--runtime transformers"),
            ([0, 0, 1, 1], 3, "gives group 0 2 of 4 in features"),
            ([1, 1, 1, 1], 2, "gives group 0 0 of 4 in features"),
        ],
    )
    def test_groups_that_a_kernel_cannot_take(self, g_idx: list[int], groups: int, words: str) -> None:
        with pytest.raises(DataError, match=words):
            gptq.order_of(np.array(g_idx, np.int32), groups)
