"""The innermost loops: a few columns, rounded one after the other because each waits for what the one before it leaves behind.

Everything around them is products of large matrices. On a GPU every operation of these loops is a kernel of its own, and launching them would
take longer than all products: `Columns` lets a backend put others in their place (kernels/cuda/columns.py has each loop in one).

Matrices are transposed: a column of the paper is a contiguous row here, [n, O] for n columns of O outputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Columns(NamedTuple):
    """The two loops, as `round_columns` and `choose_columns` below.

    Attributes:
        most: columns that they are given at a time, at most; of more, products of matrices bring the earlier ones' to the later ones.
    """

    round: Callable[..., None]
    choose: Callable[..., None]
    most: int


def round_columns(
    W: Tensor,
    A: Tensor,
    R: Tensor,
    largest: float,
    pivots: Tensor,
    groups: Tensor,
    scales: Tensor,
    lows: Tensor,
    highs: Tensor,
    Q: Tensor,
) -> None:
    """GPTQ of n columns whose A knows all columns before them (notation: gptq.py).

    Args:
        W: fp32 [n, O], contiguous, the weights as given; becomes E = W - Q.
        A: fp32 [n, O], contiguous, the sums of E_i R_ij over the columns before, divided by `largest`; becomes the errors e_j, likewise.
        R: fp32 [n, n], upper triangular, the columns' part of R.
        largest: what A and `pivots` are relative to.
        pivots: fp32 [n], R_jj / largest.
        groups: int64 [n], the group of each column.
        scales, lows, highs: fp32 [G, O], the grid of each group, its levels from low to high.
        Q: uint8 [n, O], where the codes go.
    """
    rounded = torch.empty_like(W)
    W_row, A_row, code_row, pivot_of = W.unbind(), A.unbind(), rounded.unbind(), pivots.tolist()
    for j, group in enumerate(groups.tolist()):
        w, code, scale = W_row[j], code_row[j], scales[group]
        torch.add(w, A_row[j], alpha=1 / pivot_of[j], out=code).div_(scale).round_()
        w.addcmul_(code.clamp_(lows[group], highs[group]), scale, value=-1)
        A[j + 1 :].addr_(R[j, j + 1 :], w, alpha=1 / largest)
    A.addcmul_(W, pivots[:, None])
    torch.sub(rounded, lows[groups], out=rounded)
    Q.copy_(rounded)


def choose_columns(
    R: Tensor,
    D: Tensor,
    E: Tensor,
    H: Tensor,
    diagonal: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    keep: float,
) -> None:
    """The best codes of n columns of one group, each given all others' (notation: refine.py).

    Args:
        R: fp32 [n, O], E H of these columns; becomes what is added to q.
        D: fp32 [n, O], the levels; becomes the new ones.
        E: fp32 [n, O], W - Q; kept up to date.
        H: fp32 [n, n], symmetric, the columns' part of the damped Hessian.
        diagonal: fp32 [n], its diagonal.
        scale, low, high: fp32 [O], the group's grid.
        keep: the share of the way to the best real value that is taken.
    """
    level = torch.empty_like(scale)
    for j, (r, d, pivot) in enumerate(zip(R.unbind(), D.unbind(), diagonal.tolist(), strict=True)):
        torch.div(r, scale, out=level).mul_(keep / pivot).add_(d).round_().clamp_(low, high)
        torch.sub(level, d, out=r).mul_(scale)
        d.copy_(level)
        R[j + 1 :].addr_(H[j, j + 1 :], r, alpha=-1)
    E -= R


# On CPUs; on a GPU, slowly. Below so many columns a product's own overhead is larger than what it saves.
TORCH = Columns(round_columns, choose_columns, most=16)
