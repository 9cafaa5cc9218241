"""int8 weights times activations that are quantized here token by token, in Triton, for NVIDIA GPUs from sm_75 on.

    quantize      each token to int8 codes, a scale and a zero point: the numbers of `ops.quantize_activation_per_token`, to the bit
    matvec        few tokens: one after the other, products and sums in the ordinary units
    matmul        more: a tile of tokens through the int8 tensor cores (from sm_80 on; Triton has none for sm_75)
    finish        int32 sums of products to outputs; what torch._int_mm multiplied, and sums of parts, take this way too
    dequantize    the weight, for the backward pass

Letters: M tokens, K in features, N out features. Sums of products are int32 and exact, so that the outputs do not depend on which kernel
computed them, nor on how it was cut: y = sums * weight_scale * scale + bias, in float32 and in this order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlm.kernels.cuda.cut import MatmulConfig, by_rows, split


class MatvecConfig(NamedTuple):
    """How `matvec` cuts its work: a program computes `columns` out features of one token, `features` in features at a step; they are
    split among programs until there are `per_sm` for each multiprocessor, or never (0)."""

    columns: int
    features: int
    warps: int
    per_sm: int


# What is tried, the first where nothing can be timed. Without a split there is one launch instead of two.
MATVEC = (
    MatvecConfig(columns=16, features=512, warps=4, per_sm=0),
    MatvecConfig(columns=8, features=1024, warps=4, per_sm=0),
    MatvecConfig(columns=4, features=1024, warps=4, per_sm=0),
    MatvecConfig(columns=16, features=512, warps=4, per_sm=4),
)
_FEW_ROWS = (
    MatmulConfig(rows=16, columns=64, features=128, warps=4, stages=4, per_sm=4),
    MatmulConfig(rows=16, columns=64, features=256, warps=4, stages=3, per_sm=2),
    MatmulConfig(rows=16, columns=32, features=256, warps=4, stages=4, per_sm=0),
)
_SOME_ROWS = (
    MatmulConfig(rows=64, columns=64, features=128, warps=4, stages=3, per_sm=2),
    MatmulConfig(rows=64, columns=128, features=128, warps=4, stages=3, per_sm=1),
    MatmulConfig(rows=32, columns=64, features=128, warps=4, stages=4, per_sm=0),
)
_MANY_ROWS = (
    MatmulConfig(rows=128, columns=128, features=128, warps=8, stages=3, per_sm=0),
    MatmulConfig(rows=128, columns=256, features=128, warps=8, stages=3, per_sm=0),
    MatmulConfig(rows=64, columns=128, features=64, warps=4, stages=4, per_sm=0),
)


def matmul_configs(rows: int) -> tuple[MatmulConfig, ...]:
    return by_rows(rows, _FEW_ROWS, _SOME_ROWS, _MANY_ROWS)


class Tokens(NamedTuple):
    """Quantized activations: codes int8 [M, K], scale float32 [M], zero_point int32 [M]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


class Layer(NamedTuple):
    """weight int8 [N, K], scale float [N, 1], row_sum int32 [N], bias [N] or None; outputs have the dtype `dtype`."""

    weight: Tensor
    scale: Tensor
    row_sum: Tensor
    bias: Tensor | None
    dtype: torch.dtype


def quantize(x: Tensor, symmetric: bool) -> Tokens:
    """`ops.quantize_activation_per_token` of x [M, K] float32, bfloat16 or float16, contiguous."""
    M, K = x.shape
    codes = x.new_empty(M, K, dtype=torch.int8)
    scale, zero_point = x.new_empty(M, dtype=torch.float32), x.new_empty(M, dtype=torch.int32)
    block = min(4096, triton.next_power_of_2(K))
    _quantize[(M,)](
        x, codes, scale, zero_point, K, SYMMETRIC=symmetric, BLOCK=block, num_warps=8 if block > 1024 else 4
    )
    return Tokens(codes, scale, zero_point)


def matvec(tokens: Tokens, layer: Layer, config: MatvecConfig, multiprocessors: int) -> Tensor:
    """[M, N] in the layer's dtype; for few tokens, which read the weight from the cache after the first."""
    (M, K), N = tokens.codes.shape, layer.weight.shape[0]
    blocks = M * triton.cdiv(N, config.columns)
    splits, steps_each = split(triton.cdiv(K, config.features), blocks, config.per_sm * multiprocessors)
    out = _output(tokens, layer, splits)
    _matvec[blocks, splits](
        *tokens, *layer[:-1], out, M, N, K, steps_each, FINAL=splits == 1, COLUMNS=config.columns, FEATURES=config.features,
        num_warps=config.warps,
    )  # fmt: skip
    return out if splits == 1 else finish(out, tokens, layer)


def matmul(tokens: Tokens, layer: Layer, config: MatmulConfig, multiprocessors: int) -> Tensor:
    """[M, N] in the layer's dtype."""
    (M, K), N = tokens.codes.shape, layer.weight.shape[0]
    blocks = triton.cdiv(M, config.rows) * triton.cdiv(N, config.columns)
    splits, steps_each = split(triton.cdiv(K, config.features), blocks, config.per_sm * multiprocessors)
    out = _output(tokens, layer, splits)
    _matmul[blocks, splits](
        *tokens, *layer[:-1], out, M, N, K, steps_each, FINAL=splits == 1, ROWS=config.rows, COLUMNS=config.columns,
        FEATURES=config.features, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out if splits == 1 else finish(out, tokens, layer)


def finish(sums: Tensor, tokens: Tokens, layer: Layer) -> Tensor:
    """Sums of products, int32 [M, N] or parts of them [S, M, N], to outputs [M, N] in the layer's dtype."""
    M, N = sums.shape[-2:]
    y = sums.new_empty(M, N, dtype=layer.dtype)
    parts = sums.shape[0] if sums.dim() == 3 else 1
    grid = M, triton.cdiv(N, _FINISH_COLUMNS)
    _finish[grid](sums, *tokens[1:], *layer[1:-1], y, M, N, parts, COLUMNS=_FINISH_COLUMNS, num_warps=4)
    return y


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K]: code * scale in float32, rounded to `dtype`."""
    N, K = weight.shape
    result = weight.new_empty(N, K, dtype=dtype)
    _dequantize[N, triton.cdiv(K, 1024)](weight, scale, result, K, COLUMNS=1024, num_warps=4)
    return result


_FINISH_COLUMNS = 512


def _output(tokens: Tokens, layer: Layer, splits: int) -> Tensor:
    shape = tokens.codes.shape[0], layer.weight.shape[0]
    if splits == 1:
        return tokens.codes.new_empty(shape, dtype=layer.dtype)
    return tokens.codes.new_empty(splits, *shape, dtype=torch.int32)


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _round(value):  # type: ignore[no-untyped-def]
    """Halves to even, for |value| < 2**22: 1.5 * 2**23 has no fractional bits left. (Triton's interpreter has no rint.)"""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _clamp(value):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(value, -128.0), 127.0)


@triton.jit
def _quantize(x, codes, scales, zero_points, K, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    x += row * K
    low = tl.zeros((BLOCK,), dtype=tl.float32)
    high = tl.zeros((BLOCK,), dtype=tl.float32)
    poison = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
        low, high = tl.minimum(low, value), tl.maximum(high, value)
        poison += value * 0.0  # NaN for NaN and infinite values, which minimum and maximum do not tell
    least, most = tl.min(low, axis=0), tl.max(high, axis=0)
    scale = tl.div_rn(tl.maximum(-least, most), 127.5) if SYMMETRIC else tl.div_rn(most - least, 255.0)
    scale += tl.sum(poison, axis=0)
    scale = tl.where(scale < float("inf"), scale, float("nan"))
    divisor = tl.where(scale == 0.0, 1.1920928955078125e-07, scale)  # float32's eps
    zero = tl.full((), 0.0, tl.float32)
    if not SYMMETRIC:
        zero = -128.0 - tl.div_rn(least, scale)
        zero = tl.where(zero == zero, _round(_clamp(zero)), 0.0)
    tl.store(scales + row, divisor)
    tl.store(zero_points + row, zero.to(tl.int32))
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
        code = tl.div_rn(value, divisor) + zero
        code = tl.where(code == code, _round(_clamp(code)), 0.0)
        tl.store(codes + row * K + k, code.to(tl.int8), mask=k < K)


@triton.jit
def _outputs(sums, scale, zero, weight_scales, row_sums, bias, column, inside):  # type: ignore[no-untyped-def]
    """float32 outputs of exact sums; everything has the shape of `column` and `inside`, or one that fits it."""
    weight_scale = tl.load(weight_scales + column, mask=inside, other=0).to(tl.float32)
    row_sum = tl.load(row_sums + column, mask=inside, other=0)
    y = (sums - zero * row_sum).to(tl.float32) * weight_scale * scale
    if bias is not None:
        y += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["rows", "steps_each"])
def _matvec(  # type: ignore[no-untyped-def]
    codes, scales, zero_points, weight, weight_scales, row_sums, bias, out, rows, N, K, steps_each,
    FINAL: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    # Programs that follow each other read the same part of the weight, for other tokens.
    row = tl.program_id(0) % rows
    split = tl.program_id(1)
    column = tl.program_id(0) // rows * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    weight += column.to(tl.int64)[:, None] * K
    total = tl.zeros((COLUMNS, FEATURES), dtype=tl.int32)
    for step in range(split * steps_each, tl.minimum((split + 1) * steps_each, tl.cdiv(K, FEATURES))):
        k = step * FEATURES + tl.arange(0, FEATURES)
        q = tl.load(codes + row * K + k, mask=k < K, other=0).to(tl.int32)
        w = tl.load(weight + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0).to(tl.int32)
        total += w * q[None, :]
    sums = tl.sum(total, axis=1)
    place = (split * rows + row) * N + column
    if FINAL:
        scale, zero = tl.load(scales + row), tl.load(zero_points + row)
        y = _outputs(sums, scale, zero, weight_scales, row_sums, bias, column, inside)
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + place, sums, mask=inside)


@triton.jit(do_not_specialize=["rows", "steps_each"])
def _matmul(  # type: ignore[no-untyped-def]
    codes, scales, zero_points, weight, weight_scales, row_sums, bias, out, rows, N, K, steps_each,
    FINAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    column = tl.program_id(0) // row_blocks * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < N
    codes += row.to(tl.int64)[:, None] * K
    weight += column.to(tl.int64)[None, :] * K
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for step in range(split * steps_each, tl.minimum((split + 1) * steps_each, tl.cdiv(K, FEATURES))):
        k = step * FEATURES + tl.arange(0, FEATURES)
        q = tl.load(codes + k[None, :], mask=row_inside[:, None] & (k < K)[None, :], other=0)
        w = tl.load(weight + k[:, None], mask=(k < K)[:, None] & column_inside[None, :], other=0)
        total = tl.dot(q, w, total, out_dtype=tl.int32)
    inside = row_inside[:, None] & column_inside[None, :]
    place = (split * rows + row).to(tl.int64)[:, None] * N + column[None, :]
    if FINAL:
        scale = tl.load(scales + row, mask=row_inside, other=0)[:, None]
        zero = tl.load(zero_points + row, mask=row_inside, other=0)[:, None]
        y = _outputs(total, scale, zero, weight_scales, row_sums, bias, column[None, :], column_inside[None, :])
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + place, total, mask=inside)


@triton.jit(do_not_specialize=["parts", "rows"])
def _finish(  # type: ignore[no-untyped-def]
    sums, scales, zero_points, weight_scales, row_sums, bias, out, rows, N, parts, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    total = tl.zeros((COLUMNS,), dtype=tl.int32)
    for part in range(parts):
        total += tl.load(sums + (part * rows + row) * N + column, mask=inside, other=0)
    scale, zero = tl.load(scales + row), tl.load(zero_points + row)
    y = _outputs(total, scale, zero, weight_scales, row_sums, bias, column, inside)
    tl.store(out + row * N + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize(weight, scales, out, K, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(weight + row * K + k, mask=k < K, other=0).to(tl.float32) * tl.load(scales + row).to(tl.float32)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)
