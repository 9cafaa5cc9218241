"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323): round one input column at a time, let the later columns repair the error.

Notation as in the paper: y = W x, H = E[x x^T] over the calibration tokens, H^-1 = U^T U with U upper triangular. Column j is
rounded to q_j; its error e_j = (w_j - q_j) / U_jj is subtracted from the columns after it, W_: -= e_j U_j:.

Three things differ from the paper's code, all of them within the same file format:
- the grid of a group is chosen when its first column's turn comes, from weights that hold every update so far, also inside a block
  (the usual code chooses from weights that are stale by up to one block when the group is smaller than a block);
- the grid may be searched under the weights 1 / U_jj^2 (affine.py);
- a column that no calibration token excites keeps its weights and is rounded to nearest; the usual code sets them to zero, which
  silences neurons of a ReLU network that merely did not fire in the calibration text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlm.numerics.affine import minmax_grid, search_grid

BLOCK = 128
# Columns of H that one product fills; below this a full square product is faster than its lower triangle.
GRAM_CHUNK = 512


class SingularHessian(ValueError):
    """No damping up to the mean of the diagonal makes the Hessian positive definite."""


@dataclass(frozen=True)
class Factor:
    """U of the damped Hessian H + damp mean(diag H) I, its columns in the order in which GPTQ rounds them.

    Attributes:
        U: fp32 [I, I], upper triangular.
        order: int64 [I], the input that each place of the order stands for.
        damp: the damping that was used; larger than what was asked for when the Hessian needed it.
    """

    U: Tensor
    order: Tensor
    damp: float


@dataclass(frozen=True)
class GptqResult:
    """codes uint8 [O, I] in the inputs' own order; scale fp32 [O, G] of fp16 values; zero_point int32 [O, G]; g_idx int32 [I];
    error: sqrt(tr(E H E^T)), E = W - Q, under the damped Hessian (of unit Hessian for round-to-nearest)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    g_idx: Tensor
    error: float


def add_gram_(hessian: Tensor, x: Tensor) -> None:
    """hessian += x^T x, lower block triangle only (`finish_hessian_` mirrors it). hessian fp32 [I, I], x [T, I]."""
    x = x.float()
    for start in range(0, hessian.shape[0], GRAM_CHUNK):
        stop = min(start + GRAM_CHUNK, hessian.shape[0])
        hessian[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])


def finish_hessian_(hessian: Tensor, tokens: int) -> Tensor:
    """The sum that `add_gram_` gathered, made symmetric and divided by the number of tokens, in place."""
    for start in range(0, hessian.shape[0], GRAM_CHUNK):
        stop = min(start + GRAM_CHUNK, hessian.shape[0])
        hessian[start:stop, stop:] = hessian[stop:, start:stop].T
    return hessian.div_(tokens)


def column_order(diagonal: Tensor, order: str, group_size: int) -> Tensor:
    """The order in which columns are rounded: int64 [I].

    "none": as they are. "act": by falling diagonal of H (`desc_act`). "gar": groups by their largest diagonal element, and inside
    each group by falling diagonal, so that groups stay contiguous in the file (group-aware reordering, "Dual Precision
    Quantization", CVPR workshops 2025).
    """
    if order == "none":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    if order == "act" or group_size == diagonal.numel():
        return diagonal.argsort(descending=True, stable=True)
    grouped = diagonal.view(-1, group_size)
    within = grouped.argsort(dim=1, descending=True, stable=True)
    among = grouped.amax(1).argsort(descending=True, stable=True)
    return (within + torch.arange(len(grouped), device=diagonal.device)[:, None] * group_size)[among].flatten()


def factorize(hessian: Tensor, order: Tensor, damp: float) -> Factor:
    """U with (H + damp mean(diag H) I)^-1 = U^T U, doubling the damping until the Cholesky factorization succeeds.

    One factorization instead of the usual three (Cholesky, inverse, Cholesky again): with J the reversal of the order,
    J H J = L L^T gives H = R R^T with R = J L J upper triangular, hence U = R^-1.

    Raises:
        SingularHessian: no damping up to 1 helps; or H is all zeros, or not finite.
    """
    mean = hessian.diagonal().mean().item()
    if not 0 < mean < float("inf"):
        raise SingularHessian(f"the mean of the Hessian's diagonal is {mean}")
    reverse = order.flip(0)
    attempt = damp
    while True:
        damped = hessian[reverse[:, None], reverse]
        damped.diagonal().add_(attempt * mean)
        L, info = torch.linalg.cholesky_ex(damped)
        del damped
        if info.item() == 0:
            R = L.flip(0, 1)
            del L
            U = invert_triangular(R)
            del R
            # NaN in H passes the factorization on some platforms; a pivot near zero makes U infinite.
            if bool(U.isfinite().all()):
                return Factor(U, order, attempt)
        if attempt >= 1:
            raise SingularHessian(
                f"not positive definite, even with a damping of {attempt:g} times the mean of its diagonal"
            )
        attempt = min(2 * attempt if attempt > 0 else 1e-4, 1.0)


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


def gptq(weight: Tensor, factor: Factor, *, bits: int, group_size: int, symmetric: bool, search: bool) -> GptqResult:
    """Round `weight` to a grid of 2^bits levels for each group of `group_size` columns.

    Args:
        weight: [O, I], any float dtype. Rows are independent: linears that share their input may be stacked.
        factor: of the inputs' Hessian, in the order wanted. Groups are formed along the order, so with "act" they are not
            contiguous in the file and g_idx is a real permutation.
        group_size: divides I.
        search: choose scales by `search_grid` instead of `minmax_grid`.
    Raises:
        ValueError: a weight is NaN or infinite, or too large for a scale in fp16.
    """
    O, I = weight.shape
    U, order = factor.U, factor.order
    # Transposed, so that a column of the paper is contiguous here.
    W = weight.float().T[order].contiguous()
    Q = torch.empty((I, O), dtype=torch.uint8, device=W.device)
    scales = torch.empty((I // group_size, O), device=W.device)
    zeros = torch.empty_like(scales)
    # 1 / U_jj^2, relative to the largest: a Hessian of very large or small inputs would overflow.
    importance = (U.diagonal().amin() / U.diagonal()).square()
    error_squared = torch.zeros((), dtype=torch.float64, device=W.device)
    top = 2**bits - 1

    block = BLOCK if group_size % BLOCK == 0 or BLOCK % group_size == 0 else group_size
    for start in range(0, I, block):
        stop = min(start + block, I)
        E = torch.empty((stop - start, O), device=W.device)
        for j in range(start, stop):
            group = j // group_size
            if j % group_size == 0:
                members = slice(j, j + group_size)
                if search:
                    scale, zero = search_grid(W[members], importance[members], bits, symmetric)
                else:
                    scale, zero = minmax_grid(W[members], bits, symmetric)
                scales[group], zeros[group] = scale, zero
            w = W[j]
            code = (w / scale).round_().add_(zero).clamp_(0, top)
            Q[j] = code
            e = E[j - start]
            torch.sub(w, code.sub_(zero).mul_(scale), out=e)
            e.div_(U[j, j])
            W[j + 1 : stop].addr_(U[j, j + 1 : stop], e, alpha=-1)
        W[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
        error_squared += torch.linalg.vector_norm(E, dtype=torch.float64).square()

    if not bool(error_squared.isfinite()):
        raise ValueError("the repaired weights are NaN or infinite: the weights or the Hessian are too large for fp32")

    # Back to the inputs' own order, and, where groups are contiguous there, the groups to theirs.
    groups = torch.arange(I, device=W.device) // group_size
    codes, g_idx = torch.empty_like(Q), torch.empty_like(groups)
    codes[order], g_idx[order] = Q, groups
    if bool((g_idx.view(-1, group_size) == g_idx.view(-1, group_size)[:, :1]).all()):
        place = g_idx[::group_size]
        scales, zeros, g_idx = scales[place], zeros[place], groups
    return GptqResult(
        codes=codes.T.contiguous(),
        scale=scales.T.contiguous(),
        zero_point=zeros.T.to(torch.int32).contiguous(),
        g_idx=g_idx.to(torch.int32),
        error=error_squared.sqrt().item(),
    )


def weighted_norm(weight: Tensor, factor: Factor) -> float:
    """sqrt(tr(W H W^T)) under the factor's damped Hessian: what `GptqResult.error` is to be compared with. weight [O, I]."""
    columns = weight.float()[:, factor.order]
    whitened = torch.linalg.solve_triangular(factor.U, columns, upper=True, left=False)
    return torch.linalg.vector_norm(whitened, dtype=torch.float64).item()
