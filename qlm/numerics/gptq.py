"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323): round one input column at a time, let the later columns repair the error.

Notation as in the paper: y = W x, H = E[x x^T] over the calibration tokens, H^-1 = U^T U with U upper triangular. Column j is
rounded to q_j; its error e_j = (w_j - q_j) / U_jj is subtracted from the columns after it, W_: -= e_j U_j:.

The same numbers come without an inverse. With H = R R^T, R = U^-1 upper triangular, the updates add up to e = E R, E = W - Q for
the weights as given: once the columns before j are rounded, A_j = sum over them of E_i R_ij is known, column j repaired is
w_j + A_j / R_jj, and e_j = A_j + E_j R_jj. What is lost, tr(E H E^T), is the sum of all e_j^2.

Four more things differ from the paper's code, all of them within the same file format:
- sums reach the later columns by halves instead of by blocks of 128: once the left half of a range is rounded, one matrix product
  brings its errors to the right half. Each pair of columns meets once, as in the paper, nearly always inside a large product;
- the grid of a group is chosen when its first column's turn comes, from weights that hold every repair so far (the usual code
  chooses from weights that are stale by up to one block when the group is smaller than a block), or, on demand, for all groups
  in advance;
- the grid may be searched under the weights 1 / U_jj^2 = R_jj^2 (affine.py);
- a column that no calibration token excites keeps its weights and is rounded to nearest; the usual code sets them to zero, which
  silences neurons of a ReLU network that merely did not fire in the calibration text.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qlm.numerics.affine import RowError, minmax_grid, search_grid
from qlm.numerics.columns import TORCH, Columns

# Columns that are ordered by the pivots as they are when the first of them is taken. One at a time loses another 0.5 % less.
PIVOT_BATCH = 16
# Columns of a triangle that one product fills; below this a full square product is faster than its triangle.
TRIANGLE_CHUNK = 256
# What a sum of products is made symmetric by; divides TRIANGLE_CHUNK.
TILE = 64


class SingularHessian(ValueError):
    """No damping up to the mean of the diagonal makes the Hessian positive definite."""


@dataclass(frozen=True)
class Factor:
    """R of the damped Hessian H + damp mean(diag H) I = R R^T, its columns in the order in which GPTQ rounds them.

    Attributes:
        R: fp32 [I, I], upper triangular.
        order: int64 [I], the input that each place of the order stands for.
        damp: the damping that was used; larger than what was asked for when the Hessian needed it.
    """

    R: Tensor
    order: Tensor
    damp: float

    @cached_property
    def U(self) -> Tensor:
        """R^-1, the paper's factor of the inverse."""
        return invert_triangular(self.R)


@dataclass(frozen=True)
class GptqResult:
    """Codes on affine grids, and what they lose.

    Attributes:
        codes: uint8 [O, I], in the inputs' own order.
        scale: fp32 [O, G] of fp16 values; may be negative.
        zero_point: int32 [O, G].
        g_idx: int32 [I], the group of each input.
        loss: float64 [O], diag(E H E^T), E = W - Q, under the damped Hessian (the unit Hessian for round-to-nearest).
        nearest_rows: rows that `keep_nearest_where_better` rounded to nearest.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    g_idx: Tensor
    loss: Tensor
    nearest_rows: int = 0

    @property
    def error(self) -> float:
        """sqrt(tr(E H E^T))."""
        return self.loss.sum().sqrt().item()

    def dequantize(self) -> Tensor:
        """Q, fp32 [O, I]."""
        group = self.g_idx.long()
        return self.scale[:, group] * (self.codes - self.zero_point[:, group])


def add_gram_(hessian: Tensor, x: Tensor) -> None:
    """hessian += x^T x, at least the lower triangle's tiles of `TILE` (`finish_hessian_` mirrors them). hessian fp32 [I, I], x [T, I]."""
    x = x.float()
    for start in range(0, hessian.shape[0], TRIANGLE_CHUNK):
        stop = min(start + TRIANGLE_CHUNK, hessian.shape[0])
        hessian[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])


def finish_hessian_(hessian: Tensor, tokens: int) -> Tensor:
    """The sum that `add_gram_` gathered, made symmetric and divided by the number of tokens, in place."""
    for start in range(0, hessian.shape[0], TILE):
        stop = min(start + TILE, hessian.shape[0])
        hessian[start:stop, stop:] = hessian[stop:, start:stop].T
    return hessian.div_(tokens)


def column_order(diagonal: Tensor, order: str, group_size: int) -> Tensor:
    """The order in which columns are rounded: int64 [I].

    "none": as they are. "act" and "static": by falling diagonal of H (`desc_act`). "gar": groups by their largest diagonal element,
    and inside each group by falling diagonal, so that groups stay contiguous in the file (group-aware reordering, "Dual Precision
    Quantization", CVPR workshops 2025).
    """
    if order == "none":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    if order in ("act", "static") or group_size == diagonal.numel():
        return diagonal.argsort(descending=True, stable=True)
    grouped = diagonal.view(-1, group_size)
    within = grouped.argsort(dim=1, descending=True, stable=True)
    among = grouped.amax(1).argsort(descending=True, stable=True)
    return (within + torch.arange(len(grouped), device=diagonal.device)[:, None] * group_size)[among].flatten()


def factorize_in_order(hessian: Tensor, order: str, group_size: int, damp: float) -> Factor:
    """`factorize` in `column_order`, except that "static", whose groups do not depend on the order, takes the best one:
    `factorize_by_pivots`.

    Raises:
        SingularHessian: as `factorize`.
    """
    if order == "static":
        return factorize_by_pivots(hessian, damp)
    return factorize(hessian, column_order(hessian.diagonal(), order, group_size), damp)


def factorize(hessian: Tensor, order: Tensor, damp: float) -> Factor:
    """R with H + damp mean(diag H) I = R R^T, doubling the damping until that succeeds, up to 1; from 0 it goes to 1e-4 first.

    With J the reversal of the order, J H J = L L^T (Cholesky) gives R = J L J.

    Raises:
        SingularHessian: no damping up to 1 helps; or H is all zeros, or not finite.
    """
    reverse = order.flip(0)

    def attempt(added: float) -> tuple[Tensor, Tensor] | None:
        damped = hessian[reverse[:, None], reverse]
        damped.diagonal().add_(added)
        L, info = torch.linalg.cholesky_ex(damped)
        del damped  # as large as the Hessian, and R is another
        return None if info.item() else (L.flip(0, 1), order)

    return _with_damping(attempt, hessian, damp)


def factorize_by_pivots(hessian: Tensor, damp: float) -> Factor:
    """As `factorize`, in an order in which GPTQ loses little, found while factorizing.

    What is lost is the sum of squared rounding errors, each times R_jj^2: the part of H_jj that the columns after j cannot repair.
    The product of all R_jj^2 is det H in any order, so that their sum is least where they are most alike: made from its end, the
    order takes the columns of which least is left after those taken so far have repaired what they can (the least pivot of "The
    geometry of LLM quantization: GPTQ as Babai's nearest plane algorithm", Chen et al. 2025, arXiv:2507.18553).

    Raises:
        SingularHessian: as `factorize`.
    """

    def attempt(added: float) -> tuple[Tensor, Tensor] | None:
        damped = hessian.clone()
        damped.diagonal().add_(added)
        return _take_least_pivots(damped)

    return _with_damping(attempt, hessian, damp)


def _with_damping(attempt: Callable[[float], tuple[Tensor, Tensor] | None], hessian: Tensor, damp: float) -> Factor:
    """The first R and order, of more and more damping, that `attempt` can make and that hold something."""
    mean = hessian.diagonal().mean().item()
    if not 0 < mean < float("inf"):
        raise SingularHessian(f"the mean of the Hessian's diagonal is {mean}")
    while True:
        found = attempt(damp * mean)
        if found is not None:
            R, order = found
            # NaN in H passes the factorization on some platforms, and what is left of a column that depends on others is rounding.
            if _finite(R) and R.diagonal().amin().item() ** 2 > torch.finfo(R.dtype).eps * mean:
                return Factor(R, order, damp)
        if damp >= 1:
            raise SingularHessian(
                f"not positive definite, even with a damping of {damp:g} times the mean of its diagonal"
            )
        damp = min(2 * damp if damp > 0 else 1e-4, 1.0)


def _take_least_pivots(S: Tensor) -> tuple[Tensor, Tensor] | None:
    """R and the order for a damped Hessian, which is used up; None if it is not positive definite."""
    L, left, orders = torch.zeros_like(S), torch.arange(len(S), device=S.device), []
    while len(left):
        done, pivots = len(L) - len(left), S.diagonal().clone()
        # Rows of S are brought up to date as they are taken, S itself when X is full.
        X = S.new_empty(min(TRIANGLE_CHUNK, len(left)), len(left))
        taken, failed = [], torch.zeros((), dtype=torch.int32, device=S.device)
        for start in range(0, len(X), PIVOT_BATCH):
            chosen = pivots.argsort(stable=True)[: min(PIVOT_BATCH, len(X) - start)]
            rows = S[chosen].addmm_(X[:start, chosen].T, X[:start], alpha=-1)
            corner, info = torch.linalg.cholesky_ex(rows[:, chosen])
            x = torch.linalg.solve_triangular(corner, rows, upper=False).masked_fill_(pivots.isinf(), 0)
            x[:, chosen] = corner.T
            X[start : start + len(x)] = x
            pivots -= x.square().sum(0)
            pivots[chosen] = torch.inf
            taken.append(chosen)
            failed += info
        if failed.item() or not _finite(X):
            return None
        L[left, done : done + len(X)] = X.T
        orders.append(left[torch.cat(taken)])
        keep = (~pivots.isinf()).nonzero()[:, 0]
        rest = X[:, keep]
        S, left = S[keep[:, None], keep].addmm_(rest.T, rest, alpha=-1), left[keep]
    order = torch.cat(orders).flip(0)
    return L[order].flip(1), order


def invert_triangular(R: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves: [[A, B], [0, D]]^-1 = [[A^-1, -A^-1 B D^-1], [0, D^-1]].

    torch has no triangular inverse, and solving for the columns of the identity takes half as many operations again.
    """
    n = len(R)
    if n <= 256:
        return torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True)
    half = n // 2
    A, D = invert_triangular(R[:half, :half]), invert_triangular(R[half:, half:])
    inverse = torch.zeros_like(R)
    inverse[:half, :half], inverse[half:, half:] = A, D
    torch.matmul(A @ R[:half, half:], D, out=inverse[:half, half:]).neg_()
    return inverse


def unit_factor(inputs: int, device: torch.device | str = "cpu") -> Factor:
    """The factor of the unit Hessian, with which `gptq` is round-to-nearest."""
    return Factor(torch.eye(inputs, device=device), torch.arange(inputs, device=device), 0.0)


def gptq(
    weight: Tensor,
    factor: Factor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    search: bool,
    static: bool = False,
    columns: Columns = TORCH,
) -> GptqResult:
    """Round `weight` to a grid of 2^bits levels for each group of `group_size` columns.

    Args:
        weight: [O, I], any float dtype. Rows are independent: linears that share their input may be stacked.
        factor: of the inputs' Hessian, in the order wanted. Groups are formed along the order, so with "act" they are not
            contiguous in the file and g_idx is a real permutation.
        group_size: divides I.
        search: choose scales by `search_grid` instead of `minmax_grid`.
        static: groups are the contiguous ones whatever the order, their grids chosen in advance from the weights as given.
        columns: the innermost loop, for the device that everything is on.
    Raises:
        ValueError: `group_size` does not divide I; a weight is NaN or infinite, or too large for a scale in fp16.
    """
    O, I = weight.shape
    _check(weight, group_size)
    R, order = factor.R, factor.order
    # Transposed, so that a column of the paper is contiguous here. W becomes E and A becomes e as columns are rounded.
    W = weight.float().T.contiguous()[order]
    A = torch.zeros_like(W)
    Q = torch.empty((I, O), dtype=torch.uint8, device=W.device)
    scales = torch.empty((I // group_size, O), device=W.device)
    lows, highs = torch.empty_like(scales), torch.empty_like(scales)
    # A is kept as a multiple of the largest R_jj: squares of errors under very large or small inputs would overflow.
    largest = R.diagonal().amax().item()
    pivots = R.diagonal() / largest
    places = torch.arange(I, device=W.device)
    groups = (order if static else places) // group_size

    def set_grid(group: int, repaired: Tensor, importance: Tensor) -> None:
        scale, zero = choose_grid(repaired, importance, bits, symmetric, search)
        scales[group], lows[group], highs[group] = scale, -zero, 2**bits - 1 - zero

    def enter_group(start: int, stop: int) -> None:
        members, repaired = slice(start, stop), W[start:stop]
        if start > 0:
            corner = R[members, members] / largest
            repaired = repaired + torch.linalg.solve_triangular(corner, A[members].T, upper=True, left=False).T
        set_grid(start // group_size, repaired, pivots[members].square())

    # Groups that are formed along the order end where a half ends, so that a group begins when all before it is done.
    unit = I if static else group_size

    # It is handed to itself: through its closure it would hold all matrices here until the garbage collector comes.
    def solve(start: int, stop: int, solve: Callable[..., None]) -> None:
        """Round columns start ... stop, whose A knows all columns before them."""
        if not static and start % group_size == 0 and stop - start == group_size:
            enter_group(start, stop)
        if stop - start <= min(columns.most, unit):
            part = slice(start, stop)
            grids = groups[part], scales, lows, highs
            return columns.round(W[part], A[part], R[part, part], largest, pivots[part], *grids, Q[part])
        middle = (start + stop) // 2
        if stop - start > unit:
            middle -= middle % unit
        solve(start, middle, solve)
        A[middle:stop].addmm_(R[start:middle, middle:stop].T, W[start:middle], alpha=1 / largest)
        solve(middle, stop, solve)

    if static:
        for group, members in enumerate(order.argsort().view(-1, group_size)):
            set_grid(group, W[members], pivots[members].square())
    solve(0, I, solve)

    loss = _column_squares(A) * largest**2
    if not bool(loss.isfinite().all()):
        raise RowError(
            "the repaired weights are NaN or infinite: the weights or the Hessian are too large for fp32",
            int(loss.isfinite().logical_not().nonzero()[0]),
        )

    # Back to the inputs' own order, and, where groups are contiguous there, the groups to theirs.
    codes, g_idx = torch.empty_like(Q), torch.empty_like(groups)
    codes[order], g_idx[order] = Q, groups
    zeros = -lows
    if bool((g_idx.view(-1, group_size) == g_idx.view(-1, group_size)[:, :1]).all()):
        place = g_idx[::group_size]
        scales, zeros, g_idx = scales[place], zeros[place], places // group_size
    return GptqResult(
        codes=codes.T.contiguous(),
        scale=scales.T.contiguous(),
        zero_point=zeros.T.to(torch.int32).contiguous(),
        g_idx=g_idx.to(torch.int32),
        loss=loss,
    )


def choose_grid(weight: Tensor, importance: Tensor, bits: int, symmetric: bool, search: bool) -> tuple[Tensor, Tensor]:
    """scale and zero_point, fp32 [O]. weight [g, O], importance [g]."""
    return search_grid(weight, importance, bits, symmetric) if search else minmax_grid(weight, bits, symmetric)


def _finite(x: Tensor) -> bool:
    """All of x, from its two ends: NaN and infinities show there."""
    return bool(torch.stack(x.aminmax()).isfinite().all())


def check_finite(weight: Tensor) -> None:
    """Raises ValueError for a weight that is NaN or infinite."""
    if not _finite(weight):
        raise ValueError("a weight is NaN or infinite")


def _check(weight: Tensor, group_size: int) -> None:
    if group_size < 1 or weight.shape[1] % group_size:
        raise ValueError(f"groups of {group_size} do not divide {weight.shape[1]} inputs")
    check_finite(weight)


def round_to_nearest(weight: Tensor, g_idx: Tensor, *, bits: int, symmetric: bool, search: bool) -> GptqResult:
    """Every weight to the nearest level of its group's grid; searched grids have the least |W - Q|^2.

    Args:
        weight: [O, I], any float dtype. g_idx: int [I], the group of each input; groups are of one size.
    Raises:
        ValueError: as `gptq`.
    """
    return _round_to_nearest(weight, g_idx, bits, symmetric, search)[0]


def _round_to_nearest(
    weight: Tensor, g_idx: Tensor, bits: int, symmetric: bool, search: bool
) -> tuple[GptqResult, Tensor]:
    """The result, and E transposed: fp32 [I, O]."""
    group_size = int((g_idx == g_idx[0]).sum())
    _check(weight, group_size)
    order = g_idx.argsort(stable=True)
    W = weight.float().T.contiguous()[order]
    Q = torch.empty_like(W, dtype=torch.uint8)
    scales, zeros = [], []
    for members, codes in zip(W.split(group_size), Q.split(group_size), strict=True):
        scale, zero = choose_grid(members, torch.ones(group_size, device=W.device), bits, symmetric, search)
        level = (members / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
        codes.copy_(level)
        members.addcmul_(level.sub_(zero), scale, value=-1)
        scales.append(scale)
        zeros.append(zero)
    place = order.argsort()
    E = W[place]
    result = GptqResult(
        codes=Q[place].T.contiguous(),
        scale=torch.stack(scales, 1),
        zero_point=torch.stack(zeros, 1).to(torch.int32),
        g_idx=g_idx.to(torch.int32),
        loss=_column_squares(E),
    )
    return result, E


def keep_nearest_where_better(
    weight: Tensor, factor: Factor, result: GptqResult, *, bits: int, symmetric: bool, search: bool
) -> GptqResult:
    """`result` with the rows rounded to nearest that lose less so, under the factor's damped Hessian.

    Repairs that fall outside a row's grid are lost on the columns that were to make them: seen at 2 bits without a search, and where
    columns are nearly copies of each other. Without damping the rows are no worse either: damping adds a multiple of |W - Q|^2, of
    which rounding to nearest has the least.
    """
    nearest, E = _round_to_nearest(weight, result.g_idx, bits, symmetric, search)
    loss = _losses(E[factor.order], factor)
    better = loss < result.loss
    if not bool(better.any()):
        return result
    pick = better[:, None]
    return replace(
        result,
        codes=torch.where(pick, nearest.codes, result.codes),
        scale=torch.where(pick, nearest.scale, result.scale),
        zero_point=torch.where(pick, nearest.zero_point, result.zero_point),
        loss=torch.where(better, loss, result.loss),
        nearest_rows=int(better.sum()),
    )


def _column_squares(W: Tensor) -> Tensor:
    """Sums of squares of each column, float64 [O], without a float64 copy of W [I, O]. Squares of weights of 1e-30 exist in float64
    only."""
    return torch.stack([part.double().square_().sum(0) for part in W.split(TRIANGLE_CHUNK)]).sum(0)


def _losses(E: Tensor, factor: Factor) -> Tensor:
    """diag(E^T H E) under the factor's damped Hessian: float64 [O]. E fp32 [I, O], inputs in the factor's order."""
    R = factor.R
    largest = R.diagonal().amax()
    loss = torch.zeros(E.shape[1], dtype=torch.float64, device=E.device)
    for start in range(0, len(R), TRIANGLE_CHUNK):
        stop = start + TRIANGLE_CHUNK
        loss += (R[:stop, start:stop].T @ E[:stop]).div_(largest).double().square_().sum(0)
    return loss * largest.double().square()


def row_losses(E: Tensor, factor: Factor) -> Tensor:
    """diag(E H E^T) under the factor's damped Hessian: float64 [O]. E [O, I], inputs in their own order."""
    return _losses(E.float().T.contiguous()[factor.order], factor)


def weighted_norm(weight: Tensor, factor: Factor) -> float:
    """sqrt(tr(W H W^T)) under the factor's damped Hessian: what `GptqResult.error` is to be compared with. weight [O, I]."""
    return row_losses(weight, factor).sum().sqrt().item()
