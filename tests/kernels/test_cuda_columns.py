"""The innermost loops of quantizing for GPUs under Triton's interpreter, against their equations in float64 and against whole solutions.

Functions named `check_...` run in the process that interprets (`interpreted.py`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlm.numerics.columns import TORCH, Columns
from qlm.numerics.gptq import GptqResult, factorize_in_order, gptq, row_losses
from qlm.numerics.refine import refine

# A value this far from the middle between two levels, in steps, is rounded alike by all.
FAR = 1e-3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grids_of(groups: int, outputs: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of either sign, zero points anywhere."""
    zero = torch.randint(1, 2**bits, (groups, outputs), generator=torch.Generator().manual_seed(5)).float()
    return random(groups, outputs, seed=6) * 2 ** (1 - bits), -zero, 2**bits - 1 - zero


def assert_nearest(level: Tensor, best: Tensor, low: Tensor, high: Tensor) -> None:
    """All levels are whole and on the grid; where `best`, float64, lies clearly nearer to one of them, it is that one."""
    assert torch.equal(level, level.round())
    assert ((low <= level) & (level <= high)).all()
    best = best.clamp(low.double(), high.double())
    assert (best - level).abs().max() <= 0.5 + FAR


def check_round(count: int, outputs: int, bits: int) -> None:
    from qlm.kernels.cuda.columns import round_columns

    # The columns' part of a larger matrix, which lies column by column, as factorizations leave it.
    R = random(40, 40, seed=1).tril().T[7 : 7 + count, 7 : 7 + count]
    R.diagonal().abs_().add_(0.5)
    largest = 3.0
    W, A, pivots = random(count, outputs, seed=2), random(count, outputs, seed=3) * 0.2, R.diagonal() / largest
    groups = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(4))
    scales, lows, highs = grids_of(3, outputs, bits)
    E, sums, Q = W.clone(), A.clone(), torch.full((count + 1, outputs), 77, dtype=torch.uint8)
    round_columns(E, sums, R, largest, pivots, groups, scales, lows, highs, Q[:count])
    assert (Q[count] == 77).all()
    level = Q[:count] + lows[groups]
    assert torch.allclose(E, W - level * scales[groups], atol=1e-6)
    # Given the errors that were made, what each column should have been repaired by.
    earlier = R.triu(1).T.double() @ E.double() / largest + A.double()
    best = (W.double() + earlier / pivots[:, None]) / scales[groups].double()
    assert_nearest(level, best, lows[groups], highs[groups])
    assert torch.allclose(sums.double(), earlier + E.double() * pivots[:, None], atol=1e-5)


def check_choose(count: int, outputs: int, bits: int) -> None:
    from qlm.kernels.cuda.columns import choose_columns

    H = random(40, 40, seed=1)
    H = (H @ H.T / 40)[3 : 3 + count, 3 : 3 + count]
    scale, low, high = (part[0] for part in grids_of(1, outputs, bits))
    start = (random(count, outputs, seed=2) * 3).round().clamp(low, high)
    R, E = random(count, outputs, seed=3), random(count, outputs, seed=4)
    moves, levels, errors = R.clone(), start.clone(), E.clone()
    keep = 0.999
    choose_columns(moves, levels, errors, H, H.diagonal().contiguous(), scale, low, high, keep)
    assert torch.allclose(moves, (levels - start) * scale, atol=1e-6)
    assert torch.allclose(errors, E - moves, atol=1e-6)
    left = R.double() - H.triu(1).T.double() @ moves.double()
    best = keep * left / H.diagonal()[:, None] / scale + start
    assert_nearest(levels, best, low.expand_as(levels), high.expand_as(levels))
    assert count == 1 or (levels != start).any()


def columns() -> Columns:
    from qlm.kernels.cuda.columns import MOST, choose_columns, round_columns

    return Columns(round_columns, choose_columns, MOST)


def solve(order: str, group_size: int, how: Columns) -> tuple[GptqResult, GptqResult, list[Tensor]]:
    """GPTQ's result and its refinement, and the losses of both."""
    x = random(300, 48, seed=1) @ random(48, 48, seed=2)
    weight, hessian = random(30, 48, seed=3), x.T @ x / 300
    factor = factorize_in_order(hessian, order, group_size, 0.01)
    first = gptq(
        weight, factor, bits=3, group_size=group_size, symmetric=False, search=True, static=order == "static", columns=how
    )  # fmt: skip
    second = refine(
        weight, hessian, 0.01, first.codes, first.scale, first.zero_point, first.g_idx, 3, sweeps=2, columns=how
    )
    return first, second, [row_losses(weight - result.dequantize(), factor) for result in (first, second)]


def check_whole(order: str, group_size: int) -> None:
    *found, losses = solve(order, group_size, columns())
    *expected, losses_of_torch = solve(order, group_size, TORCH)
    for mine, other, loss, other_loss in zip(found, expected, losses, losses_of_torch, strict=True):
        # A code that tips over changes what comes after it in its row.
        assert ((mine.codes != other.codes).any(1).float().mean()) <= 0.1
        assert torch.allclose(mine.loss, loss, rtol=1e-3)
        assert abs(loss.sum() / other_loss.sum() - 1) < 0.01


def check_not_finite() -> None:
    from qlm.kernels.cuda.columns import round_columns

    for bad in (float("nan"), float("inf")):
        W, A = torch.ones(2, 8), torch.zeros(2, 8)
        W[0, 3] = bad
        scales, codes = torch.ones(1, 8), torch.zeros(2, 8, dtype=torch.uint8)
        groups = torch.zeros(2, dtype=torch.int64)
        round_columns(W, A, torch.ones(2, 2).triu(), 1.0, torch.ones(2), groups, scales, -scales, 6 * scales, codes)
        # What callers look at.
        assert not A[:, 3].isfinite().any()
        assert A[:, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize(("count", "outputs", "bits"), [(16, 70, 4), (1, 1, 2), (7, 33, 8), (16, 32, 3)])
class TestLoops:
    def test_round(self, count: int, outputs: int, bits: int, interpreted: Callable[..., Any]) -> None:
        interpreted(check_round, count, outputs, bits)

    def test_choose(self, count: int, outputs: int, bits: int, interpreted: Callable[..., Any]) -> None:
        interpreted(check_choose, count, outputs, bits)


@pytest.mark.parametrize(("order", "group_size"), [("static", 16), ("act", 24), ("none", 48), ("gar", 12)])
def test_whole(order: str, group_size: int, interpreted: Callable[..., Any]) -> None:
    interpreted(check_whole, order, group_size)


def test_not_finite(interpreted: Callable[..., Any]) -> None:
    interpreted(check_not_finite)
