"""The GPTQ kernels for GPUs under Triton's interpreter, against float64 weights that `qlm.numerics.packing` describes.

Functions named `check_...` run in the process that interprets (`interpreted.py`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from qlm.kernels import cuda_ops, ops
from qlm.numerics.packing import encode_zero_points, pack_rows, unpack_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = (2, 3, 4, 8)
# Groups in file order of so many in features; all of them one group; scattered; of different sizes.
GROUPS = ("128", "32", "one", "act", "irregular")
# Of the largest output. float32: the order of a float32 sum of 256 products. 16 bits: one rounding of the output, to the nearest for
# float16; the interpreter cuts a bfloat16's bits off instead of rounding (`_convert_float`), here and in the weight.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


class File(NamedTuple):
    """A layer as a file has it, and its weight [K, N] in float64."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int
    v2: bool
    weight: Tensor


def file(bits: int, groups: str, v2: bool = False, K: int = 256, N: int = 96, scales: Any = torch.float16) -> File:
    generator = torch.Generator().manual_seed(bits)
    size = {"one": K, "act": 32, "irregular": 48}[groups] if not groups.isdigit() else int(groups)
    g_idx = torch.arange(K) // size
    if groups in ("act", "irregular"):
        g_idx = g_idx[torch.randperm(K, generator=generator)]
    if groups == "irregular":  # the third group has lost some
        g_idx = torch.where((g_idx == 2) & (torch.arange(K) % 3 == 0), 0, g_idx)
    G = int(g_idx.max()) + 1
    codes = torch.randint(0, 2**bits, (K, N), generator=generator)
    zero_point = torch.randint(0 if v2 else 1, 2**bits, (G, N), generator=generator)
    scale = (torch.rand(G, N, generator=generator) * 0.1 + 0.01).to(scales)
    weight = scale.double()[g_idx] * (codes - zero_point[g_idx])
    qzeros = encode_zero_points(zero_point, bits, "gptq_v2" if v2 else "gptq")
    return File(pack_rows(codes, bits), qzeros, scale, g_idx.to(torch.int32), bits, v2, weight)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 weight in `dtype` as the interpreter rounds it."""
    if dtype != torch.bfloat16:
        return weight.float().to(dtype)
    return (weight.float().view(torch.int32) >> 16 << 16).view(torch.float32).to(dtype)


def assert_close(y: Tensor, expected: Tensor, dtype: torch.dtype, what: object) -> None:
    assert y.dtype == dtype, what
    assert y.shape == expected.shape, what
    error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
    assert error < TOLERANCE[dtype], (what, error)


def kept(layer: File) -> cuda_ops._GptqLayer:
    return cuda_ops._gptq_layer(*layer[:6], ops._zero_points)


def as_read(layer: File, x: Tensor) -> tuple[Any, Tensor]:
    """The layer for a kernel, and x in its order."""
    from qlm.kernels.cuda import gptq

    made = kept(layer)
    if made.order is None:
        return cuda_ops._in_file_order(made, layer.qweight, layer.scales, layer.g_idx, layer.bits), x
    found = gptq.Layer(made.words, layer.scales, made.zero_point, made.g_idx, layer.bits, made.group_size)
    return found, x.index_select(1, made.order)


# Kernels --------------------------------------------------------------------------------------------------------------


def check_matvec(bits: int, groups: str, v2: bool) -> None:
    from qlm.kernels.cuda import gptq

    K = {"act": 128, "irregular": 128, "32": 224}.get(groups, 256)  # 224: not a whole number of steps
    layer = file(bits, groups, v2, K)
    for dtype, rows, per_sm in zip(DTYPES, (1, 2, 1), (0, 1, 2), strict=True):
        x, bias = random(rows, K, dtype=dtype), random(96, dtype=dtype, seed=1) if rows > 1 else None
        expected = x.double() @ layer.weight + (0 if bias is None else bias.double())
        read, ordered = as_read(layer, x)
        # A block that is not full; the in features by one program, or dealt to two or four.
        config = gptq.MatvecConfig(columns=128, fields=4, features=64, warps=4, per_sm=per_sm)
        y = gptq.matvec(ordered, read, bias, config, 2)
        assert_close(y, expected, dtype, (dtype, rows, per_sm))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_matvec(bits: int, groups: str, interpreted: Callable[..., Any]) -> None:
    interpreted(check_matvec, bits, groups, GROUPS.index(groups) % 2 == bits % 2)


def check_matmul(bits: int, groups: str, v2: bool) -> None:
    from qlm.kernels.cuda import gptq

    layer = file(bits, groups, v2, K=224 if groups == "32" else 256)  # 224: not a whole number of steps of 64
    K = len(layer.g_idx)
    for dtype in (torch.float16, torch.bfloat16):
        for rows, per_sm in ((1, 0), (3, 2), (16, 0), (17, 1)) if dtype == torch.float16 else ((64, 0),):
            x, bias = random(rows, K, dtype=dtype), random(96, dtype=dtype, seed=1) if rows > 1 else None
            expected = x.double() @ rounded(layer.weight, dtype).double() + (0 if bias is None else bias.double())
            config = gptq.MatmulConfig(
                rows=16 if rows < 64 else 32, columns=64, features=64, warps=4, stages=2, per_sm=per_sm
            )
            read, ordered = as_read(layer, x)
            y = gptq.matmul(ordered, read, bias, config, 8)
            assert_close(y, expected, dtype, (dtype, rows, per_sm))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_matmul(bits: int, groups: str, interpreted: Callable[..., Any]) -> None:
    interpreted(check_matmul, bits, groups, GROUPS.index(groups) % 2 != bits % 2)


def check_every_config() -> None:
    """What may be chosen computes the same, twice to the bit."""
    from qlm.kernels.cuda import gptq

    layer = file(4, "128")
    x = random(2, 256, dtype=torch.float16)
    exact, in_tile = x.double() @ layer.weight, x.double() @ rounded(layer.weight, torch.float16).double()
    read, _ = as_read(layer, x)
    for config in gptq.MATVEC:
        y = gptq.matvec(x[:1], read, None, config, 2)
        assert_close(y, exact[:1], torch.float16, config)
        assert torch.equal(y, gptq.matvec(x[:1], read, None, config, 2))
    for rows in (16, 64, 128):
        for config in gptq.matmul_configs(rows):
            assert_close(gptq.matmul(x, read, None, config, 2), in_tile, torch.float16, config)


def test_every_config(interpreted: Callable[..., Any]) -> None:
    interpreted(check_every_config)


def check_dequantize(bits: int) -> None:
    from qlm.kernels.cuda import gptq

    for groups in (*GROUPS, "20" if bits in (4, 8) else "48"):
        layer = file(bits, groups, True, K=160 if groups == "20" else 128, scales=torch.float32)
        read = cuda_ops._in_file_order(kept(layer), layer.qweight, layer.scales, layer.g_idx, bits)
        for dtype in DTYPES if groups == "act" else DTYPES[:1]:
            # Exact in float32: the codes less the zero points are integers, and one product with a float32 scale is rounded once.
            assert torch.equal(gptq.dequantize(read, dtype), rounded(layer.weight, dtype)), (groups, dtype)


@pytest.mark.parametrize("bits", BITS)
def test_dequantize(bits: int, interpreted: Callable[..., Any]) -> None:
    interpreted(check_dequantize, bits)


def check_arrange(bits: int) -> None:
    from qlm.kernels.cuda import gptq

    layer = file(bits, "32", N=40 if bits in (4, 8) else 32)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(9))
    arranged = gptq.arrange(layer.qweight, order, bits)
    assert torch.equal(unpack_rows(arranged, bits), unpack_rows(layer.qweight, bits)[order])


@pytest.mark.parametrize("bits", BITS)
def test_arrange(bits: int, interpreted: Callable[..., Any]) -> None:
    interpreted(check_arrange, bits)


def check_group_that_ends_inside_a_word() -> None:
    from qlm.kernels.cuda import gptq

    layer = file(4, "20", K=160)
    for dtype in DTYPES[:2]:
        x = random(2, 160, dtype=dtype)
        y = gptq.matvec(x, as_read(layer, x)[0], None, gptq.MATVEC[0], 2)
        assert_close(y, x.double() @ layer.weight, dtype, dtype)


def test_group_that_ends_inside_a_word(interpreted: Callable[..., Any]) -> None:
    interpreted(check_group_that_ends_inside_a_word)
