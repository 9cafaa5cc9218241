"""The int8 kernels for GPUs under Triton's interpreter: codes, scales, zero points and int32 sums to the bit, outputs as the reference's.

Functions named `check_...` run in the process that interprets (`interpreted.py`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qlm.kernels import cuda_ops, ops
from qlm.kernels.cuda_ops import Gpu
from qlm.kernels.ops import int8_linear_reference, int8_row_sum, quantize_activation_per_token

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TURING, AMPERE = Gpu((7, 5), 4), Gpu((8, 0), 4)
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens_of_many_kinds(K: int, dtype: torch.dtype) -> Tensor:
    """[16, K]: what has gone wrong in quantizers before. Tokens 6 to 8 and 12 are not finite, or their range is not."""
    x = random(16, K)
    x[1], x[2], x[3] = 0, x[2].abs(), -x[3].abs()  # nothing, nothing below 0, nothing above
    x[4] = (torch.arange(K) % 256) - 128.5  # halves
    x[5] = (torch.arange(K) % 255 - 127).float()  # halves for the symmetric scale
    x[6, 3], x[7, 2], x[8, 1] = float("nan"), float("inf"), -float("inf")
    x[9], x[10], x[11] = x[9] * 1e-3, 1e-44, x[11] * 1e4
    x[12], x[12, 0] = 3e38, -3e38
    x[13], x[13, 1] = 0, 1e-44
    x[14, : K // 2] = 0
    return x.to(dtype)


def weights(N: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, -128 among them, scales, sums of rows, bias."""
    codes = torch.randint(-128, 128, (N, K), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    return codes, random(N, 1, seed=2).abs() / 127, int8_row_sum(codes), random(N, seed=3)


def cut(y: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 in `dtype` as the interpreter rounds it: bits of a bfloat16 are cut off."""
    return (y.view(torch.int32) >> 16 << 16).view(torch.float32).to(dtype) if dtype == torch.bfloat16 else y.to(dtype)


def assert_same(y: Tensor, expected: Tensor, what: object) -> None:
    assert y.dtype == expected.dtype, what
    assert torch.equal(y.isnan(), expected.isnan()), what
    assert torch.equal(y.nan_to_num(), expected.nan_to_num()), (what, (y - expected).abs().max())


def check_quantize(K: int, symmetric: bool) -> None:
    from qlm.kernels.cuda import int8

    for dtype in DTYPES:
        x = tokens_of_many_kinds(K, dtype)
        codes, scale, zero_point = quantize_activation_per_token(x, symmetric)
        found = int8.quantize(x, symmetric)
        assert torch.equal(found.codes, codes), dtype
        assert torch.equal(found.scale.nan_to_num(-1), scale[:, 0].nan_to_num(-1)), dtype
        assert torch.equal(found.zero_point, zero_point[:, 0]), dtype
        # The range of token 12 is more than float32 holds, and in float16 its values are infinite.
        assert int(scale.isnan().sum()) == (3 if symmetric and dtype != torch.float16 else 4)


@SYMMETRIC
@pytest.mark.parametrize("K", [5, 320, 5000, 17000])  # 5000: of 8192 in registers; 17000: five blocks
def test_quantize(K: int, symmetric: bool, interpreted: Callable[..., Any]) -> None:
    interpreted(check_quantize, K, symmetric)


def check_products(N: int, K: int, symmetric: bool) -> None:
    """Every kernel, split and not, has the reference's bits: float32 operations in the same order on the same int32 sums."""
    from qlm.kernels.cuda import int8

    codes, scale, row_sum, bias = weights(N, K)
    for dtype in DTYPES:
        x = tokens_of_many_kinds(K, dtype)
        tokens = int8.quantize(x, symmetric)
        layer = int8.Layer(codes, scale, row_sum, None if dtype == torch.float16 else bias, dtype)
        # The reference's result in float32, from the same values.
        exact = int8_linear_reference(x.float(), codes, scale, row_sum, layer.bias, symmetric)
        expected = cut(exact, dtype)
        for per_sm in (0, 4):
            few = int8.Tokens(*(part[5:8] for part in tokens))
            config = int8.MatvecConfig(columns=16, features=256, warps=4, per_sm=per_sm)
            assert_same(int8.matvec(few, layer, config, 2), expected[5:8], ("matvec", dtype, per_sm))
            tile = int8.MatmulConfig(rows=16, columns=32, features=64, warps=4, stages=2, per_sm=2 * per_sm)
            assert_same(int8.matmul(tokens, layer, tile, 2), expected, ("matmul", dtype, per_sm))
        # Of the kinds that a scale and a zero point have, and one that is not finite.
        for row in () if K % 4 else {torch.float32: (0, 6), torch.float16: (1, 4), torch.bfloat16: (3, 8)}[dtype]:
            config = int8.MatvecConfig(columns=64, features=512, warps=4, per_sm=0)
            y = int8.fused_matvec(x[row : row + 1], symmetric, layer, config)
            assert_same(y, expected[row : row + 1], ("fused", dtype, row))
        sums = tokens.codes.int() @ codes.int().t()
        assert_same(int8.finish(sums, tokens, layer), expected, ("finish", dtype))


@SYMMETRIC
@pytest.mark.parametrize(("N", "K"), [(96, 320), (60, 1100), (3, 5)])
def test_products(N: int, K: int, symmetric: bool, interpreted: Callable[..., Any]) -> None:
    interpreted(check_products, N, K, symmetric)


def check_every_config() -> None:
    from qlm.kernels.cuda import int8

    codes, scale, row_sum, bias = weights(70, 600)
    x = random(17, 600)
    tokens = int8.quantize(x, False)
    layer = int8.Layer(codes, scale, row_sum, bias, torch.float32)
    expected = int8_linear_reference(x, codes, scale, row_sum, bias, False)
    one = int8.Tokens(*(part[:1] for part in tokens))
    for config in int8.MATVEC:
        assert_same(int8.matvec(one, layer, config, 2), expected[:1], config)
    for config in int8.FUSED:
        assert_same(int8.fused_matvec(x[:1], False, layer, config), expected[:1], config)
    for rows in (16, 64, 128):
        for tile in int8.matmul_configs(rows):
            assert_same(int8.matmul(tokens, layer, tile, 2), expected, tile)


def test_every_config(interpreted: Callable[..., Any]) -> None:
    interpreted(check_every_config)


def check_dequantize() -> None:
    from qlm.kernels.cuda import int8

    codes, scale, *_ = weights(7, 1100)
    for dtype in DTYPES:
        for kind in (torch.float32, torch.bfloat16):
            weight = codes.float() * scale.to(kind).float()
            assert torch.equal(int8.dequantize(codes, scale.to(kind), dtype), cut(weight, dtype)), (dtype, kind)


def test_dequantize(interpreted: Callable[..., Any]) -> None:
    interpreted(check_dequantize)


def check_op() -> None:
    codes, scale, row_sum, bias = weights(24, 64)
    for rows in (1, 3, 16, 17, 64):
        x = random(rows, 64, seed=rows)
        for gpu in (TURING, AMPERE):
            y = cuda_ops.int8_product(x, codes, scale, row_sum, bias, False, gpu)
            if gpu is TURING and rows > 16:
                assert y is None  # cuBLAS's, which is not here
            else:
                assert y is not None
                assert_same(y, int8_linear_reference(x, codes, scale, row_sum, bias, False), (rows, gpu))
    x = random(2, 3, 64)
    expected = int8_linear_reference(x, codes, scale, row_sum, None, True)
    assert_same(cuda_ops.int8_product(x, codes, scale, row_sum, None, True, AMPERE), expected, "leading dimensions")
    strided = random(6, 128)
    strided[:, ::2] = x.view(6, 64)
    y = cuda_ops.int8_product(strided[:, ::2], codes, scale, row_sum, None, True, AMPERE)
    assert_same(y, expected.view(6, 24), "strides")
    for empty in ((0,), (4, 0)):
        y = cuda_ops.int8_product(x.new_zeros(*empty, 64), codes, scale, row_sum, None, False, AMPERE)
        assert y is not None
        assert y.shape == (*empty, 24)
    wide = torch.zeros(1, ops.MAX_IN_FEATURES)  # more than int32 holds with -128 among the codes
    layer = torch.zeros(1, ops.MAX_IN_FEATURES, dtype=torch.int8), torch.ones(1, 1), torch.zeros(1, dtype=torch.int32)
    assert cuda_ops.int8_product(wide, *layer, None, False, AMPERE) is None


def test_op(interpreted: Callable[..., Any]) -> None:
    interpreted(check_op)


def check_backward(symmetric: bool) -> None:
    """The gradient's weight comes from the kernel: it has the interpreter's bfloat16. That x was rounded leaves no trace."""
    codes, scale, row_sum, bias = weights(48, 160)
    exact = codes.double() * scale.double()
    for dtype, tolerance in zip(DTYPES, (1e-6, 1e-3, 1e-2), strict=True):
        x, own_bias = (t.to(dtype, copy=True).requires_grad_() for t in (random(2, 5, 160), bias))
        upstream = random(2, 5, 48, seed=5).to(dtype)
        y = ops.int8_linear(x, codes, scale, row_sum, own_bias, symmetric)
        with (
            mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: tensor.dtype == torch.int8)),
            mock.patch.object(cuda_ops, "_gpu_of", return_value=AMPERE),
            mock.patch.object(cuda_ops, "int8_weight", wraps=cuda_ops.int8_weight) as made,
            mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        ):
            y.backward(upstream)
        assert made.call_count == 1
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert torch.equal(x.grad, upstream @ cut(codes * scale, dtype)), dtype
        expected = upstream.double() @ exact
        assert (x.grad.double() - expected).abs().max() < tolerance * expected.abs().max(), dtype
        assert own_bias.grad is not None
        torch.testing.assert_close(own_bias.grad, upstream.float().sum((0, 1)).to(dtype))


@SYMMETRIC
def test_backward(symmetric: bool, interpreted: Callable[..., Any]) -> None:
    interpreted(check_backward, symmetric)
