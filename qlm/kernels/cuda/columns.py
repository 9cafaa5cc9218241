"""The innermost loops of GPTQ and of coordinate descent, each a kernel (their equations, as torch operations: numerics/columns.py).

A program keeps `COLUMNS` columns of a few outputs in registers, from the first load to the last store: what an earlier column changes in
a later one needs no memory, and outputs do not wait for each other. The loop over columns is unrolled, and so the code grows with the
square of their number.
"""

import triton
import triton.language as tl
from torch import Tensor

from qlm.kernels.cuda.rounding import nearest_level

# More columns take the compiler minutes; fewer, and products of small matrices take the time.
MOST = 16
# Outputs of a program, one for each thread: many programs of one warp, since every step waits for the one before.
_OUTPUTS = 32


def round_columns(
    W: Tensor, A: Tensor, R: Tensor, largest: float, pivots: Tensor, groups: Tensor, scales: Tensor, lows: Tensor, highs: Tensor, Q: Tensor,
) -> None:  # fmt: skip
    """`numerics.columns.round_columns`, of at most `MOST` columns. All but R are contiguous. Where anything is NaN or infinite, A tells."""
    count, outputs = W.shape
    assert count <= MOST
    assert all(t.is_contiguous() for t in (W, A, pivots, groups, scales, lows, highs, Q))
    _round[(triton.cdiv(outputs, _OUTPUTS),)](
        W, A, R, pivots, groups, scales, lows, highs, Q, outputs, *R.stride(), 1 / largest,
        COLUMNS=count, OUTPUTS=_OUTPUTS, num_warps=1,
    )  # fmt: skip


def choose_columns(
    R: Tensor, D: Tensor, E: Tensor, H: Tensor, diagonal: Tensor, scale: Tensor, low: Tensor, high: Tensor, keep: float
) -> None:
    """`numerics.columns.choose_columns`, of at most `MOST` columns. All but H are contiguous."""
    count, outputs = R.shape
    assert count <= MOST
    assert all(t.is_contiguous() for t in (R, D, E, diagonal, scale, low, high))
    _choose[(triton.cdiv(outputs, _OUTPUTS),)](
        R, D, E, H, diagonal, scale, low, high, outputs, *H.stride(), keep, COLUMNS=count, OUTPUTS=_OUTPUTS, num_warps=1
    )


# Kernels --------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["per_largest"])
def _round(  # type: ignore[no-untyped-def]
    W, A, R, pivots, groups, scales, lows, highs, Q, outputs, row, column, per_largest,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < outputs
    errors, sums, codes = (), (), ()
    for j in tl.static_range(COLUMNS):
        a = tl.load(A + j * outputs + output, mask=inside, other=0.0)
        for i in tl.static_range(j):
            a += errors[i] * per_largest * tl.load(R + i * row + j * column)
        w = tl.load(W + j * outputs + output, mask=inside, other=0.0)
        pivot = tl.load(pivots + j)
        place = tl.load(groups + j) * outputs + output
        scale = tl.load(scales + place, mask=inside, other=1.0)
        low = tl.load(lows + place, mask=inside, other=0.0)
        high = tl.load(highs + place, mask=inside, other=0.0)
        level = nearest_level(tl.div_rn(w + tl.div_rn(a, pivot), scale), low, high)
        error = w - level * scale
        errors, sums, codes = errors + (error,), sums + (a + error * pivot,), codes + (level - low,)  # type: ignore[assignment]  # noqa: RUF005
    # Behind all loads, which would have to wait for them: for all that the compiler knows, they lie in the same memory.
    for j in tl.static_range(COLUMNS):
        tl.store(W + j * outputs + output, errors[j], mask=inside)
        tl.store(A + j * outputs + output, sums[j], mask=inside)
        tl.store(Q + j * outputs + output, codes[j].to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["keep"])
def _choose(  # type: ignore[no-untyped-def]
    R, D, E, H, diagonal, scales, lows, highs, outputs, row, column, keep, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < outputs
    scale = tl.load(scales + output, mask=inside, other=1.0)
    low = tl.load(lows + output, mask=inside, other=0.0)
    high = tl.load(highs + output, mask=inside, other=0.0)
    moves, levels, errors = (), (), ()
    for j in tl.static_range(COLUMNS):
        r = tl.load(R + j * outputs + output, mask=inside, other=0.0)
        for i in tl.static_range(j):
            r -= moves[i] * tl.load(H + i * row + j * column)
        d = tl.load(D + j * outputs + output, mask=inside, other=0.0)
        best = tl.div_rn(r, scale) * (keep / tl.load(diagonal + j)) + d
        level = nearest_level(best, low, high)
        move = (level - d) * scale
        error = tl.load(E + j * outputs + output, mask=inside, other=0.0) - move
        moves, levels, errors = moves + (move,), levels + (level,), errors + (error,)  # type: ignore[assignment]  # noqa: RUF005
    for j in tl.static_range(COLUMNS):
        tl.store(R + j * outputs + output, moves[j], mask=inside)
        tl.store(D + j * outputs + output, levels[j], mask=inside)
        tl.store(E + j * outputs + output, errors[j], mask=inside)
