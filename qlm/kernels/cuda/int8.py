"""int8 weights times activations that are quantized here token by token, in Triton, for NVIDIA GPUs from sm_75 on.

    quantize      each token to int8 codes, a scale and a zero point: the numbers of `ops.quantize_activation_per_token`, to the bit
    matvec        few tokens: one after the other, four products at a time in the ordinary units
    fused_matvec  the same for one token that is quantized on the way: one launch where the others are two
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
from qlm.kernels.cuda.rounding import nearest_level


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
    MatvecConfig(columns=16, features=512, warps=4, per_sm=4),
)
# Of `fused_matvec`, never split: every program quantizes the whole token, which pays with many columns or for small layers.
FUSED = (
    MatvecConfig(columns=32, features=1024, warps=8, per_sm=0),
    MatvecConfig(columns=16, features=1024, warps=8, per_sm=0),
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
# On sm_90 Triton waits for every step's int8 products before it begins the next: what overlaps are several programs on a multiprocessor,
# for which the second and third are small enough; the last waits half as often.
_MANY_ROWS = (
    MatmulConfig(rows=128, columns=128, features=128, warps=8, stages=3, per_sm=0),
    MatmulConfig(rows=64, columns=128, features=128, warps=4, stages=3, per_sm=0),
    MatmulConfig(rows=64, columns=256, features=64, warps=4, stages=4, per_sm=0),
    MatmulConfig(rows=128, columns=128, features=256, warps=8, stages=2, per_sm=0),
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
    whole = K <= _MOST_IN_REGISTERS
    block = triton.next_power_of_2(K) if whole else 4096
    warps = 4 if block <= 1024 else 8 if block <= 4096 else 16
    _quantize[(M,)](x, codes, scale, zero_point, K, SYMMETRIC=symmetric, WHOLE=whole, BLOCK=block, num_warps=warps)
    return Tokens(codes, scale, zero_point)


def by_fours(weight: Tensor) -> bool:
    """Whether four codes of a row of weight [N, K] can be read as one number."""
    return weight.shape[1] % 4 == 0 and weight.storage_offset() % 4 == 0


def matvec(tokens: Tokens, layer: Layer, config: MatvecConfig, multiprocessors: int) -> Tensor:
    """[M, N] in the layer's dtype; for few tokens, which read the weight from the cache after the first."""
    (M, K), N = tokens.codes.shape, layer.weight.shape[0]
    blocks = M * triton.cdiv(N, config.columns)
    splits, steps_each = split(triton.cdiv(K, config.features), blocks, config.per_sm * multiprocessors)
    out, fours = _output(tokens, layer, splits), by_fours(layer.weight)
    _matvec[blocks, splits](
        *tokens, *layer[:-1], out, M, N, K, steps_each, FINAL=splits == 1, COLUMNS=config.columns, FEATURES=config.features,
        WORD=4 if fours else 1, DP4A=fours and not _interpreted(tokens.codes), num_warps=config.warps,
    )  # fmt: skip
    return out if splits == 1 else finish(out, tokens, layer)


def fused_matvec(x: Tensor, symmetric: bool, layer: Layer, config: MatvecConfig) -> Tensor:
    """`matvec(quantize(x, symmetric), ...)` of one token x [1, K], to the bit; for weights that are read `by_fours`."""
    assert by_fours(layer.weight)
    N, K = layer.weight.shape
    out = x.new_empty(1, N, dtype=layer.dtype)
    _fused_matvec[(triton.cdiv(N, config.columns),)](
        x, *layer[:-1], out, N, K, SYMMETRIC=symmetric, COLUMNS=config.columns, FEATURES=config.features,
        BLOCK=min(4096, triton.next_power_of_2(K)), DP4A=not _interpreted(x), num_warps=config.warps,
    )  # fmt: skip
    return out


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
    rows = _FINISH_ROWS if M >= _FINISH_ROWS else 1
    grid = triton.cdiv(M, rows), triton.cdiv(N, _FINISH_COLUMNS)
    _finish[grid](sums, *tokens[1:], *layer[1:-1], y, M, N, parts, ROWS=rows, COLUMNS=_FINISH_COLUMNS, num_warps=4)
    return y


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, K]: code * scale in float32, rounded to `dtype`."""
    N, K = weight.shape
    result = weight.new_empty(N, K, dtype=dtype)
    _dequantize[N, triton.cdiv(K, 1024)](weight, scale, result, K, COLUMNS=1024, num_warps=4)
    return result


# Values of a token that `_quantize` keeps, 32 in each thread at most, instead of reading them a second time.
_MOST_IN_REGISTERS = 16384
# Rows share what is read for their columns.
_FINISH_ROWS, _FINISH_COLUMNS = 4, 512


def _interpreted(tensor: Tensor) -> bool:
    """By Triton's interpreter, which knows no instructions of a GPU."""
    return tensor.device.type == "cpu"


def _output(tokens: Tokens, layer: Layer, splits: int) -> Tensor:
    shape = tokens.codes.shape[0], layer.weight.shape[0]
    if splits == 1:
        return tokens.codes.new_empty(shape, dtype=layer.dtype)
    return tokens.codes.new_empty(splits, *shape, dtype=torch.int32)


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _range(low, high, poison, value):  # type: ignore[no-untyped-def]
    """`value` counted in: the least and the largest so far, and NaN for NaN and infinite values, which the two do not tell."""
    return tl.minimum(low, value), tl.maximum(high, value), poison + value * 0.0


@triton.jit
def _grid(low, high, poison, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """(scale, zero point), float32, of a token with this range, which includes 0."""
    least, most = tl.min(low, axis=0), tl.max(high, axis=0)
    scale = tl.div_rn(tl.maximum(-least, most), 127.5) if SYMMETRIC else tl.div_rn(most - least, 255.0)
    scale += tl.sum(poison, axis=0)
    scale = tl.where(scale < float("inf"), scale, float("nan"))
    zero = tl.full((), 0.0, tl.float32)
    if not SYMMETRIC:
        zero = -128.0 - tl.div_rn(least, scale)
        zero = tl.where(zero == zero, nearest_level(zero, -128.0, 127.0), 0.0)
    return tl.where(scale == 0.0, 1.1920928955078125e-07, scale), zero  # float32's eps


@triton.jit
def _quantized(value, scale, zero):  # type: ignore[no-untyped-def]
    """The codes of values, int32."""
    code = tl.div_rn(value, scale) + zero
    return tl.where(code == code, nearest_level(code, -128.0, 127.0), 0.0).to(tl.int32)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x, codes, scales, zero_points, K, SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """WHOLE: a token is one block, which stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    x += row * K
    codes += row * K
    k = tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), dtype=tl.float32)
    high, poison = low, low
    if WHOLE:
        value = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
        low, high, poison = _range(low, high, poison, value)
    else:
        for start in range(0, K, BLOCK):
            value = tl.load(x + start + k, mask=start + k < K, other=0).to(tl.float32)
            low, high, poison = _range(low, high, poison, value)
    scale, zero = _grid(low, high, poison, SYMMETRIC)
    tl.store(scales + row, scale)
    tl.store(zero_points + row, zero.to(tl.int32))
    if WHOLE:
        tl.store(codes + k, _quantized(value, scale, zero).to(tl.int8), mask=k < K)
    else:
        for start in range(0, K, BLOCK):
            value = tl.load(x + start + k, mask=start + k < K, other=0).to(tl.float32)
            tl.store(codes + start + k, _quantized(value, scale, zero).to(tl.int8), mask=start + k < K)


@triton.jit
def _outputs(sums, scale, zero, weight_scales, row_sums, bias, column, inside):  # type: ignore[no-untyped-def]
    """float32 outputs of exact sums; everything has the shape of `column` and `inside`, or one that fits it."""
    weight_scale = tl.load(weight_scales + column, mask=inside, other=0).to(tl.float32)
    row_sum = tl.load(row_sums + column, mask=inside, other=0)
    y = (sums - zero * row_sum).to(tl.float32) * weight_scale * scale
    if bias is not None:
        y += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    return y


@triton.jit
def _words(codes, WORD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pointer to WORD codes at a time."""
    return codes.to(tl.pointer_type(tl.int32), bitcast=True) if WORD == 4 else codes


@triton.jit
def _add_products(total, w, q, WORD: tl.constexpr, DP4A: tl.constexpr):  # type: ignore[no-untyped-def]
    """total + w * q, int32: of codes, or of the four that each number holds."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, q, total], dtype=tl.int32, is_pure=True, pack=1
        )
    elif WORD == 4:
        for i in tl.static_range(4):
            total += (w << (24 - 8 * i) >> 24) * (q << (24 - 8 * i) >> 24)
        return total
    else:
        return total + w.to(tl.int32) * q.to(tl.int32)


@triton.jit(do_not_specialize=["rows", "steps_each"])
def _matvec(  # type: ignore[no-untyped-def]
    codes, scales, zero_points, weight, weight_scales, row_sums, bias, out, rows, N, K, steps_each,
    FINAL: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, WORD: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = FEATURES // WORD
    # Programs that follow each other read the same part of the weight, for other tokens.
    row = tl.program_id(0) % rows
    split = tl.program_id(1)
    column = tl.program_id(0) // rows * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    words = K // WORD
    codes = _words(codes, WORD) + row * words
    weight = _words(weight, WORD) + column.to(tl.int64)[:, None] * words
    total = tl.zeros((COLUMNS, WORDS), dtype=tl.int32)
    for step in range(split * steps_each, tl.minimum((split + 1) * steps_each, tl.cdiv(K, FEATURES))):
        k = step * WORDS + tl.arange(0, WORDS)
        # First, since the codes go through shared memory, and what follows that is not loaded before.
        w = tl.load(weight + k[None, :], mask=inside[:, None] & (k < words)[None, :], other=0)
        q = tl.load(codes + k, mask=k < words, other=0)
        total = _add_products(total, w, tl.broadcast_to(q[None, :], (COLUMNS, WORDS)), WORD, DP4A)
    sums = tl.sum(total, axis=1)
    place = (split * rows + row) * N + column
    if FINAL:
        scale, zero = tl.load(scales + row), tl.load(zero_points + row)
        y = _outputs(sums, scale, zero, weight_scales, row_sums, bias, column, inside)
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + place, sums, mask=inside)


@triton.jit
def _fused_matvec(  # type: ignore[no-untyped-def]
    x, weight, weight_scales, row_sums, bias, out, N, K,
    SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, BLOCK: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = FEATURES // 4
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    words = K // 4
    weight = _words(weight, 4) + column.to(tl.int64)[:, None] * words
    place = tl.arange(0, WORDS)
    byte = tl.arange(0, 4)[None, :]
    # A step's weight is on its way while its part of the token is quantized; the first step's, while the token's range is found.
    w = tl.load(weight + place[None, :], mask=inside[:, None] & (place < words)[None, :], other=0)
    low = tl.zeros((BLOCK,), dtype=tl.float32)
    high, poison = low, low
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        low, high, poison = _range(low, high, poison, tl.load(x + k, mask=k < K, other=0).to(tl.float32))
    scale, zero = _grid(low, high, poison, SYMMETRIC)
    total = tl.zeros((COLUMNS, WORDS), dtype=tl.int32)
    for _ in range(tl.cdiv(K, FEATURES)):
        k = place[:, None] * 4 + byte
        value = tl.load(x + k, mask=k < K, other=0).to(tl.float32)
        q = tl.sum((_quantized(value, scale, zero) & 255) << 8 * byte, axis=1)  # four codes in one number
        total = _add_products(total, w, tl.broadcast_to(q[None, :], (COLUMNS, WORDS)), 4, DP4A)
        place += WORDS
        w = tl.load(weight + place[None, :], mask=inside[:, None] & (place < words)[None, :], other=0)
    y = _outputs(tl.sum(total, axis=1), scale, zero.to(tl.int32), weight_scales, row_sums, bias, column, inside)
    tl.store(out + column, y.to(out.dtype.element_ty), mask=inside)


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
    sums, scales, zero_points, weight_scales, row_sums, bias, out, rows, N, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < N
    inside = row_inside[:, None] & column_inside[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for part in range(parts):
        total += tl.load(sums + (part * rows + row)[:, None] * N + column[None, :], mask=inside, other=0)
    scale = tl.load(scales + row, mask=row_inside, other=0)[:, None]
    zero = tl.load(zero_points + row, mask=row_inside, other=0)[:, None]
    y = _outputs(total, scale, zero, weight_scales, row_sums, bias, column[None, :], column_inside[None, :])
    tl.store(out + row[:, None] * N + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize(weight, scales, out, K, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(weight + row * K + k, mask=k < K, other=0).to(tl.float32) * tl.load(scales + row).to(tl.float32)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)
