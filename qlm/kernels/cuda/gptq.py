"""Products with weights in the GPTQ file layout, in Triton, for NVIDIA GPUs from sm_75 on.

    matvec        a few rows: the words are read once, every code becomes a float32 in a register and is multiplied there
    matmul        more rows of float16 or bfloat16: a tile of the weight is dequantized in registers and fed to the tensor cores
    dequantize    the weight itself, for the backward pass and for very many rows
    arrange       the words of a layer whose groups are scattered over the in features, sorted by group; done once

Letters: M rows of x, K in features, N out features, G groups. Sums are float32. Where the in features are split among programs, each
writes its part and `_add_parts` adds them in order: no float is added atomically, so that a call repeated gives the same bytes.

A *field* is what the kernels read at once: 16, 8, 8 or 4 codes of 2, 3, 4 or 8 bits along K, in the low bits of an unsigned word. With
3 bits it is cut out of two words of the file: 32 codes in three words are four fields of 24 bits.

A code becomes a float without a conversion, which GPUs do at a quarter of their speed: the bits of a code at position p of the word,
with the exponent of 2**(23 - p) put above them, are the float 2**(23 - p) + code. (Kim et al., "Who Says Elephants Can't
Run", 2022, and `dequant` in IST-DASLab's `marlin_cuda_kernel.cu` do so with float16.) What is subtracted, 2**(23 - p) + zero point, fits
a float's 24 bits: both steps are exact.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlm.kernels.cuda.cut import MatmulConfig, by_rows, split

# What a scale and a zero point hold for, as a kernel steps along K.
_PER_STEP, _PER_FIELD, _PER_FEATURE = 0, 1, 2
# The bits of 2.0**23. An argument and no constant of the kernels: ptxas merges `code & mask | exponent` into one instruction only where
# one of the two is in a register.
_EXPONENT = 0x4B000000

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Layer(NamedTuple):
    """The tensors of one layer, as the kernels read them.

    Attributes:
        words: int32 [K * bits / 32, N], the file's `qweight` or what `arrange` made of it.
        scale: float [G, N].
        zero_point: uint8 [G, N], decoded.
        g_idx: int32 or int64 [K], the group of each in feature, in the order of the words.
        bits: 2, 3, 4 or 8.
        group_size: in features that share a group where feature k is of group k // group_size; 0 where only g_idx knows.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor
    g_idx: Tensor
    bits: int
    group_size: int

    @property
    def in_features(self) -> int:
        return self.g_idx.shape[0]

    @property
    def out_features(self) -> int:
        return self.scale.shape[1]


class MatvecConfig(NamedTuple):
    """How `matvec` cuts its work. All but `per_sm` are powers of two.

    Attributes:
        columns: out features of a program.
        fields: fields of each out feature that a program's warps read side by side.
        features: in features between two looks at the groups, at least as many as those fields hold.
        warps: of a program. Twice `columns` threads or more spare the scales a way through shared memory.
        per_sm: programs wanted for each multiprocessor; the in features are split until there are so many. 0: never.
    """

    columns: int
    fields: int
    features: int
    warps: int
    per_sm: int


# What is tried, the first where nothing can be timed. Chosen from the compiled code (README.md) and to be measured
# (evals/gpu_kernels.py). Without a split there is one launch instead of two, which small layers are better off with.
MATVEC = (
    MatvecConfig(columns=256, fields=4, features=128, warps=4, per_sm=4),
    MatvecConfig(columns=256, fields=4, features=128, warps=4, per_sm=0),
    MatvecConfig(columns=128, fields=4, features=128, warps=4, per_sm=8),
    MatvecConfig(columns=32, fields=64, features=512, warps=8, per_sm=0),
    MatvecConfig(columns=32, fields=32, features=256, warps=8, per_sm=0),
)
_FEW_ROWS = (
    MatmulConfig(rows=16, columns=128, features=64, warps=4, stages=3, per_sm=4),
    MatmulConfig(rows=16, columns=64, features=64, warps=4, stages=3, per_sm=6),
    MatmulConfig(rows=16, columns=64, features=64, warps=4, stages=3, per_sm=0),
)
_SOME_ROWS = (
    MatmulConfig(rows=64, columns=128, features=64, warps=4, stages=3, per_sm=2),
    MatmulConfig(rows=32, columns=128, features=64, warps=4, stages=3, per_sm=2),
    MatmulConfig(rows=64, columns=64, features=64, warps=4, stages=3, per_sm=0),
)
_MANY_ROWS = (
    MatmulConfig(rows=64, columns=128, features=64, warps=4, stages=3, per_sm=1),
    MatmulConfig(rows=128, columns=128, features=64, warps=8, stages=3, per_sm=1),
    MatmulConfig(rows=128, columns=64, features=64, warps=4, stages=3, per_sm=0),
)


def matmul_configs(rows: int) -> tuple[MatmulConfig, ...]:
    return by_rows(rows, _FEW_ROWS, _SOME_ROWS, _MANY_ROWS)


def matvec(x: Tensor, layer: Layer, bias: Tensor | None, config: MatvecConfig, multiprocessors: int) -> Tensor:
    """x @ weight + bias for few rows, which are computed one by one: the words come from the cache for all but the first.

    Args:
        x: [M, K] float32, bfloat16 or float16.
        layer: the weight.
        bias: [N] or None.
        config: how to cut it.
        multiprocessors: of the device.

    Returns:
        [M, N] in x's dtype.
    """
    (rows, K), N = x.shape, layer.out_features
    codes = _codes_of_a_field(layer.bits)
    unroll, per, group = _grouping(layer, config.fields * codes, config.features)
    blocks = rows * triton.cdiv(N, config.columns)
    features = config.fields * codes * unroll
    steps = triton.cdiv(K, features)
    splits, steps_each = split(steps, blocks, config.per_sm * multiprocessors)
    y = x.new_empty(rows, N)
    parts = y if splits == 1 else x.new_empty(splits, rows, N, dtype=torch.float32)
    _matvec[blocks, splits](
        _in_words(x), layer.words, layer.scale, layer.zero_point, layer.g_idx, bias if splits == 1 else None, parts, rows, N, K,
        steps_each, _EXPONENT, BITS=layer.bits, DTYPE=_TYPES[x.dtype], COLUMNS=config.columns, FIELDS=config.fields, UNROLL=unroll,
        PER=per, GROUP=group, EVEN=K % features == 0, STAGES=1 if per == _PER_FEATURE else 3, num_warps=config.warps,
    )  # fmt: skip
    return y if splits == 1 else _sum_of_parts(parts, bias, y)


def matmul(x: Tensor, layer: Layer, bias: Tensor | None, config: MatmulConfig, multiprocessors: int) -> Tensor:
    """x @ weight + bias with the weight rounded to x's dtype, as the reference rounds it, and sums in float32.

    Args and result as `matvec`'s; x is bfloat16 or float16.
    """
    (rows, K), N = x.shape, layer.out_features
    unroll, per, group = _grouping(layer, config.features, config.features)
    assert unroll == 1
    blocks = triton.cdiv(rows, config.rows) * triton.cdiv(N, config.columns)
    splits, steps_each = split(triton.cdiv(K, config.features), blocks, config.per_sm * multiprocessors)
    y = x.new_empty(rows, N)
    parts = y if splits == 1 else x.new_empty(splits, rows, N, dtype=torch.float32)
    dtype = _TYPES[x.dtype]
    # The interpreter multiplies bfloat16 as if it were integers.
    product = tl.float32 if x.device.type == "cpu" else dtype
    _matmul[blocks, splits](
        x, layer.words, layer.scale, layer.zero_point, layer.g_idx, bias if splits == 1 else None, parts, rows, N, K,
        steps_each, _EXPONENT, BITS=layer.bits, DTYPE=dtype, PRODUCT=product, ROWS=config.rows, COLUMNS=config.columns,
        FEATURES=config.features, PER=per, GROUP=group, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y if splits == 1 else _sum_of_parts(parts, bias, y)


def dequantize(layer: Layer, dtype: torch.dtype) -> Tensor:
    """The weight [K, N]: scale * (code - zero point) in float32, rounded to `dtype`."""
    K, N = layer.in_features, layer.out_features
    weight = layer.scale.new_empty(K, N, dtype=dtype)
    fields = triton.cdiv(K, _codes_of_a_field(layer.bits))
    grid = triton.cdiv(fields, _DEQUANTIZE_FIELDS), triton.cdiv(N, _DEQUANTIZE_COLUMNS)
    _, per, group = _grouping(layer, 0, 0)
    _dequantize[grid](
        layer.words, layer.scale, layer.zero_point, layer.g_idx, weight, N, K, _EXPONENT, BITS=layer.bits, COLUMNS=_DEQUANTIZE_COLUMNS,
        FIELDS=_DEQUANTIZE_FIELDS, PER=per, GROUP=group, num_warps=4,
    )  # fmt: skip
    return weight


def arrange(words: Tensor, order: Tensor, bits: int) -> Tensor:
    """The words of the same layer with its in features in another order.

    Args:
        words: int32 [K * bits / 32, N].
        order: integers [K]: where each in feature of the result is in `words`.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [K * bits / 32, N].
    """
    arranged = torch.empty_like(words)
    K, N = order.shape[0], words.shape[1]
    period = _codes_of_whole_words(bits)
    _arrange[K // period, triton.cdiv(N, 256)](words, order, arranged, N, BITS=bits, COLUMNS=256, num_warps=4)
    return arranged


# Choices of the launchers -----------------------------------------------------------------------------------------------

_DEQUANTIZE_FIELDS, _DEQUANTIZE_COLUMNS = 4, 128


def _codes_of_a_field(bits: int) -> int:
    return 8 if bits == 3 else 32 // bits


def _codes_of_whole_words(bits: int) -> int:
    return 32 if bits == 3 else 32 // bits


def _grouping(layer: Layer, least: int, most: int) -> tuple[int, int, int]:
    """How a kernel that reads `least` in features at once steps along K, `most` at a step at most.

    Returns:
        How many times `least` a step has; what a scale holds for; how many steps (_PER_STEP) or fields (_PER_FIELD) share it, 0: all.
    """
    size, codes = layer.group_size, _codes_of_a_field(layer.bits)
    times = max(1, most // max(1, least))
    if layer.scale.shape[0] == 1:
        return times, _PER_STEP, 0
    if size and least:
        unroll = times
        while unroll > 1 and size % (least * unroll):
            unroll //= 2
        if size % (least * unroll) == 0:
            return unroll, _PER_STEP, size // (least * unroll)
    if size and size % codes == 0:
        return times, _PER_FIELD, size // codes
    return times, _PER_FEATURE, 0


def _in_words(x: Tensor) -> Tensor:
    """Two or four values of x as one int64, so that a thread loads them at once. A row has whole words of them."""
    if x.data_ptr() % 16:
        x = x.clone()
    return x.view(torch.int64)


def _sum_of_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    count = y.numel()
    _add_parts[(triton.cdiv(count, 512),)](parts, bias, y, parts.shape[0], count, y.shape[1], BLOCK=512, num_warps=4)
    return y


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_fields(words, field, column, inside, N, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint32, the shape of `inside`: the codes of each field, the first in the lowest bits; above them are other bits."""
    if BITS == 3:
        word = field * 3 // 4
        shift = field % 4 * 24 % 32
        low = tl.load(words + word * N + column, mask=inside, other=0).to(tl.uint32, bitcast=True)
        # The first two fields of three words lie in one word each. A shift by 32 would be undefined.
        high = tl.load(words + (word + 1) * N + column, mask=inside & (shift > 8), other=0).to(tl.uint32, bitcast=True)
        return (low >> shift) | (high << ((32 - shift) & 31))
    else:
        return tl.load(words + field * N + column, mask=inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _group(index, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The group of a step or field, GROUP of which share one; 0: all do."""
    if GROUP:
        return index // GROUP
    else:
        return index * 0


@triton.constexpr_function
def _shift(bits):  # type: ignore[no-untyped-def]
    """How far a field is moved down for those of its codes that a float's 23 bits do not hold in place: by so many that these come to lie
    where others lie in place, with whom they share masks and subtrahends. But a code of 8 bits at bit 0 takes an instruction more."""
    return {2: 10, 3: 3, 4: 12, 8: 9}[bits]


@triton.jit
def _code(low, high, zero, exponent, j: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32: code j of each field, less the zero point. `high` is `low >> _shift(BITS)`."""
    IN_PLACE: tl.constexpr = 23 // BITS
    P: tl.constexpr = j * BITS if j < IN_PLACE else j * BITS - _shift(BITS)
    word = low if j < IN_PLACE else high
    value = (word & (((1 << BITS) - 1) << P)) | (exponent - (P << 23))
    return value.to(tl.float32, bitcast=True) - (zero + 2.0 ** (23 - P))


@triton.jit
def _value(word, i: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32: value i of a 64-bit word of values."""
    if DTYPE.is_fp32():
        return (word >> (32 * i)).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        # A half of a register is an operand of its own; a shift of the whole 64 bits would be instructions.
        pair = (word >> (i // 2 * 32)).to(tl.uint32)
        if DTYPE.is_bf16():  # by hand, since GPUs before sm_80 know no bfloat16
            if i % 2 == 0:
                return (pair << 16).to(tl.float32, bitcast=True)
            else:
                return (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            half = pair.to(tl.uint16) if i % 2 == 0 else (pair >> 16).to(tl.uint16)
            return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "steps_each", "exponent"])
def _matvec(  # type: ignore[no-untyped-def]
    x, words, scales, zero_points, g_idx, bias, out, rows, N, K, steps_each, exponent,
    BITS: tl.constexpr, DTYPE: tl.constexpr, COLUMNS: tl.constexpr, FIELDS: tl.constexpr, UNROLL: tl.constexpr, PER: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    VALUES: tl.constexpr = 64 // DTYPE.primitive_bitwidth  # of x in a 64-bit word
    STEP: tl.constexpr = FIELDS * UNROLL
    exponent = exponent.to(tl.uint32)
    # Programs that follow each other read the same words, for other rows.
    row = tl.program_id(0) % rows
    split = tl.program_id(1)
    column = tl.program_id(0) // rows * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < N
    total = tl.zeros((FIELDS, COLUMNS), dtype=tl.float32)
    end = tl.minimum((split + 1) * steps_each, tl.cdiv(K, STEP * CODES))
    # The next steps' words are on their way to shared memory while this one's codes are multiplied.
    for step in tl.range(split * steps_each, end, num_stages=STAGES):
        part = tl.zeros((FIELDS, COLUMNS), dtype=tl.float32)
        if PER == 0:
            group = _group(step, GROUP) * N + column
            scale = tl.load(scales + group, mask=column_inside, other=0).to(tl.float32)[None, :]
            zero = tl.load(zero_points + group, mask=column_inside, other=0).to(tl.float32)[None, :]
        for u in tl.static_range(UNROLL):
            field = step * STEP + u * FIELDS + tl.arange(0, FIELDS)
            inside = (field * CODES < K) | EVEN
            both_inside = inside[:, None] & column_inside[None, :]
            low = _load_fields(words, field[:, None], column[None, :], both_inside, N, BITS)
            high = low >> _shift(BITS)
            if PER == 1:
                group = _group(field, GROUP)[:, None] * N + column[None, :]
                scale = tl.load(scales + group, mask=both_inside, other=0).to(tl.float32)
                zero = tl.load(zero_points + group, mask=both_inside, other=0).to(tl.float32)
                part = tl.zeros((FIELDS, COLUMNS), dtype=tl.float32)
            for i in tl.static_range(CODES // VALUES):
                position = field * (CODES // VALUES) + i
                packed = tl.load(x + row * (K // VALUES) + position, mask=inside, other=0).to(tl.uint64, bitcast=True)
                for j in tl.static_range(VALUES):
                    value = _value(packed, j, DTYPE)[:, None]
                    if PER == 2:
                        k = field * CODES + (i * VALUES + j)
                        group = tl.load(g_idx + k, mask=inside, other=0).to(tl.int32)[:, None] * N + column[None, :]
                        scale = tl.load(scales + group, mask=both_inside, other=0).to(tl.float32)
                        zero = tl.load(zero_points + group, mask=both_inside, other=0).to(tl.float32)
                        part += value * (_code(low, high, zero, exponent, i * VALUES + j, BITS) * scale)
                    else:
                        part += value * _code(low, high, zero, exponent, i * VALUES + j, BITS)
            if PER == 1:
                total += part * scale
        if PER == 0:
            total += part * scale
        if PER == 2:
            total += part
    y = tl.sum(total, axis=0)
    if bias is not None:
        y += tl.load(bias + column, mask=column_inside, other=0).to(tl.float32)
    tl.store(out + (split * rows + row) * N + column, y.to(out.dtype.element_ty), mask=column_inside)


@triton.jit
def _load_step(words, step, column, column_inside, N, K, BITS: tl.constexpr, FEATURES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The fields of a step, uint32 [FIELDS, COLUMNS]."""
    CODES: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    field = step * (FEATURES // CODES) + tl.arange(0, FEATURES // CODES)
    inside = (field * CODES < K)[:, None] & column_inside[None, :]
    return _load_fields(words, field[:, None], column[None, :], inside, N, BITS)


@triton.jit
def _load_grid(  # type: ignore[no-untyped-def]
    scales, zero_points, g_idx, step, column, column_inside, N, K,
    BITS: tl.constexpr, FEATURES: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(scales, zero points) of a step, as they are stored, in a shape that fits [FIELDS, CODES, COLUMNS]."""
    CODES: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    field = step * (FEATURES // CODES) + tl.arange(0, FEATURES // CODES)
    if PER == 0:
        group = (_group(step, GROUP) * N + column)[None, None, :]
        inside = column_inside[None, None, :]
    elif PER == 1:
        group = _group(field, GROUP)[:, None, None] * N + column[None, None, :]
        inside = (field * CODES < K)[:, None, None] & column_inside[None, None, :]
    else:
        k = field[:, None] * CODES + tl.arange(0, CODES)[None, :]
        group = tl.load(g_idx + k, mask=k < K, other=0).to(tl.int32)[:, :, None] * N + column[None, None, :]
        inside = (k < K)[:, :, None] & column_inside[None, None, :]
    return tl.load(scales + group, mask=inside, other=0), tl.load(zero_points + group, mask=inside, other=0)


@triton.jit
def _weight_tile(fields, scale, zero, exponent, BITS: tl.constexpr, FEATURES: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [FEATURES, COLUMNS]: the weight of a step; as `_code`, with all codes of a field side by side."""
    CODES: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    IN_PLACE: tl.constexpr = 23 // BITS
    j = tl.arange(0, CODES)[None, :, None]
    p = tl.where(j < IN_PLACE, j * BITS, j * BITS - _shift(BITS)).to(tl.uint32)
    word = tl.where(j < IN_PLACE, fields[:, None, :], fields[:, None, :] >> _shift(BITS))
    value = ((word & (((1 << BITS) - 1) << p)) | (exponent - (p << 23))).to(tl.float32, bitcast=True)
    offset = ((150 - p) << 23).to(tl.float32, bitcast=True)  # 2.0 ** (23 - p)
    return ((value - (zero.to(tl.float32) + offset)) * scale.to(tl.float32)).reshape(FEATURES, fields.shape[1])


@triton.jit(do_not_specialize=["rows", "steps_each", "exponent"])
def _matmul(  # type: ignore[no-untyped-def]
    x, words, scales, zero_points, g_idx, bias, out, rows, N, K, steps_each, exponent,
    BITS: tl.constexpr, DTYPE: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    exponent = exponent.to(tl.uint32)
    # Programs that follow each other dequantize the same part of the weight, for other rows.
    row_blocks = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    column = tl.program_id(0) // row_blocks * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = row < rows, column < N
    x += row.to(tl.int64)[:, None] * K
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    first, end = split * steps_each, tl.minimum((split + 1) * steps_each, tl.cdiv(K, FEATURES))
    if PER < 2:
        next_fields = _load_step(words, first, column, column_inside, N, K, BITS, FEATURES)
        next_scale, next_zero = _load_grid(
            scales, zero_points, g_idx, first, column, column_inside, N, K, BITS, FEATURES, PER, GROUP
        )
    for step in range(first, end):
        k = step * FEATURES + tl.arange(0, FEATURES)
        values = tl.load(x + k[None, :], mask=row_inside[:, None] & (k < K)[None, :], other=0)
        if PER < 2:
            # In registers and on its way while this step's codes become a weight: fewer instructions than Triton's way through shared memory.
            fields, scale, zero, more = next_fields, next_scale, next_zero, column_inside & (step + 1 < end)
            next_fields = _load_step(words, step + 1, column, more, N, K, BITS, FEATURES)
            next_scale, next_zero = _load_grid(
                scales, zero_points, g_idx, step + 1, column, more, N, K, BITS, FEATURES, PER, GROUP
            )
        else:  # a scale for each code would be too many registers
            fields = _load_step(words, step, column, column_inside, N, K, BITS, FEATURES)
            scale, zero = _load_grid(
                scales, zero_points, g_idx, step, column, column_inside, N, K, BITS, FEATURES, PER, GROUP
            )
        weight = _weight_tile(fields, scale, zero, exponent, BITS, FEATURES)
        total = tl.dot(values.to(PRODUCT), weight.to(DTYPE).to(PRODUCT), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + column, mask=column_inside, other=0).to(tl.float32)[None, :]
    place = (split * rows + row).to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit(do_not_specialize=["parts_count"])
def _add_parts(parts, bias, out, parts_count, count, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [count] = the sum of parts [parts_count, count], in order, + bias [N]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(parts_count):
        total += tl.load(parts + part * count + place, mask=inside, other=0)
    if bias is not None:
        total += tl.load(bias + place % N, mask=inside, other=0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["exponent"])
def _dequantize(  # type: ignore[no-untyped-def]
    words, scales, zero_points, g_idx, out, N, K, exponent,
    BITS: tl.constexpr, COLUMNS: tl.constexpr, FIELDS: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    exponent = exponent.to(tl.uint32)
    field = tl.program_id(0) * FIELDS + tl.arange(0, FIELDS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (field * CODES < K)[:, None] & (column < N)[None, :]
    low = _load_fields(words, field[:, None], column[None, :], inside, N, BITS)
    high = low >> _shift(BITS)
    if PER < 2:
        group = _group(field, GROUP)[:, None]
        scale = tl.load(scales + (group * N + column[None, :]), mask=inside, other=0).to(tl.float32)
        zero = tl.load(zero_points + (group * N + column[None, :]), mask=inside, other=0).to(tl.float32)
    for j in tl.static_range(CODES):
        k = field * CODES + j
        if PER == 2:
            group = tl.load(g_idx + k, mask=k < K, other=0).to(tl.int32)[:, None] * N + column[None, :]
            scale = tl.load(scales + group, mask=inside, other=0).to(tl.float32)
            zero = tl.load(zero_points + group, mask=inside, other=0).to(tl.float32)
        weight = _code(low, high, zero, exponent, j, BITS) * scale
        tl.store(out + k.to(tl.int64)[:, None] * N + column[None, :], weight.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _arrange(words, order, out, N, BITS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    CODES: tl.constexpr = 32 if BITS == 3 else 32 // BITS  # that fill whole words
    WORDS: tl.constexpr = 3 if BITS == 3 else 1
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    for w in tl.static_range(WORDS):
        found = tl.zeros((COLUMNS,), dtype=tl.uint32)
        for j in tl.static_range(CODES):
            # Codes of which this word has a bit: of the three words of 3-bit codes, 10 and 21 are in two.
            if j * BITS < (w + 1) * 32 and (j + 1) * BITS > w * 32:
                bit = tl.load(order + tl.program_id(0) * CODES + j).to(tl.int64) * BITS
                place = bit // 32 * N + column
                shift = (bit % 32).to(tl.uint32)
                code = tl.load(words + place, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
                if BITS == 3:
                    straddles = inside & (shift > 29)
                    rest = tl.load(words + place + N, mask=straddles, other=0).to(tl.uint32, bitcast=True)
                    code |= rest << ((32 - shift) & 31)
                code &= (1 << BITS) - 1
                if j * BITS >= w * 32:
                    found |= code << (j * BITS - w * 32)
                else:
                    found |= code >> (w * 32 - j * BITS)
        tl.store(out + (tl.program_id(0) * WORDS + w) * N + column, found.to(tl.int32, bitcast=True), mask=inside)
