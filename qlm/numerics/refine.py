"""What makes a quantized linear's output nearer to the float one's, within the same file format: before rounding a target that makes
up for the errors of earlier layers, after it better codes and scales, and a shift of the bias.

Notation: y = W x in the float model, Q x~ in the quantized one, whose earlier layers are quantized already. H = E[x~ x~^T]
(`hessian`), G = E[x x~^T], both fp32 [I, I]; damped H = H + damp mean(diag H) I. E = W - Q.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlm.numerics.affine import LARGEST_FP16, round_to_fp16
from qlm.numerics.columns import TORCH, Columns
from qlm.numerics.gptq import TRIANGLE_CHUNK, Factor, GptqResult, SingularHessian, check_finite

# A code moves only if its best real value is beyond the middle between two levels by this share of a step: what a move gains must be
# more than the rounding of R, or fp32 noise could move codes back and forth.
RELUCTANCE = 1e-3
# Rows of a Hessian that are brought to where the weight is at once.
STRENGTH_CHUNK = 2048


def full_shift(lag: Tensor, factor: Factor) -> Tensor:
    """W' - W = L (H + lambda I)^-1, lambda = damp mean(diag H), for L = E[(t - W x~) x~^T]: fp32 [O, I].

    |t - Q x~|^2 + lambda |W - Q|^2 differs from |(W' - Q) (H + lambda I)^1/2|^2 by what does not depend on Q, so that any method
    for the layer alone repairs the layers before it when it is given W'. With t = W x, L is W (G - H), and that is QEP (Arai and
    Ichikawa 2025) and Qronos (Zhang et al. 2025); an output that is added to the residual stream may have the whole stream for t.

    Args:
        lag: L, fp32 [O, I].
        factor: of H, in any order.
    """
    moved = lag[:, factor.order]
    for triangle, upper in ((factor.R.T, False), (factor.R, True)):
        moved = torch.linalg.solve_triangular(triangle, moved, upper=upper, left=False)
    shift = torch.empty_like(moved)
    shift[:, factor.order] = moved
    return shift


def choose_strength(shift: Tensor, hessian: Tensor, lag: Tensor) -> float:
    """How much of a shift is best on samples that were kept aside: in 0 ... 1.

    |t - (W + a D) x~|^2 is a parabola in a, whose lowest point has a closed form. What rounding adds hardly depends on a, so that
    nothing needs to be quantized to find it.

    Args:
        shift: D [O, I], `full_shift` of the calibration samples.
        hessian, lag: of the samples that were kept aside. The Hessian may be on the host: it is taken there in parts.
    """
    parts = zip(hessian.split(STRENGTH_CHUNK), shift.split(STRENGTH_CHUNK, 1), strict=True)
    of_parts = [
        ((shift @ rows.to(shift.device, non_blocking=True).T) * some).sum(dtype=torch.float64) for rows, some in parts
    ]
    curvature = torch.stack(of_parts).sum().item()
    slope = (lag * shift).sum(dtype=torch.float64).item()
    return min(max(slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0


def refine(
    weight: Tensor,
    hessian: Tensor,
    damp: float,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    g_idx: Tensor,
    bits: int,
    sweeps: int,
    fit_scales: bool = True,
    columns: Columns = TORCH,
) -> GptqResult:
    """Lower tr(E H E^T), H damped, by choosing one code or one scale anew while all others stay as they are.

    With R = E H, the best real value of column j is q_j + R_j / H_jj, and the nearest level to it the best code (QuantEase, Behdin
    et al. 2023, arXiv:2309.01885); the best scale of a group with d = code - zero point is larger by (d R) / (d H d), taken if
    after rounding to fp16 it still lowers the loss. Nothing that is taken raises the loss of a row.

    Args:
        weight: [O, I], any float dtype, what to come near to.
        codes, scale, zero_point, g_idx: as in `GptqResult`; groups may be of different sizes.
        sweeps: times that every scale, then every code, is chosen anew; with 0 everything stays as it is.
        fit_scales: whether scales are.
        columns: the innermost loop, for the device that everything is on.
    Raises:
        ValueError: a weight is NaN or infinite. SingularHessian: H is all zeros, or not finite.
    """
    check_finite(weight)
    mean = hessian.diagonal().mean().item()
    if not 0 < mean < float("inf"):
        raise SingularHessian(f"the mean of the Hessian's diagonal is {mean}")
    order = g_idx.argsort(stable=True)
    # Relative to its diagonal: under very large or small inputs squares would overflow.
    H = hessian[order[:, None], order].div_(mean)
    H.diagonal().add_(damp)
    diagonal = H.diagonal().contiguous()
    sizes = g_idx.bincount(minlength=scale.shape[1]).tolist()
    group = g_idx[order].long()

    # Transposed, so that a column is contiguous; levels instead of codes: q = scale * level.
    # Copies: of a single group or output the transposed view is contiguous already, and S is changed below.
    S, Z = (t.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for t in (scale, zero_point))
    lows, highs = -Z, 2**bits - 1 - Z
    D = codes.T[order] - Z[group]
    E = weight.float().T[order] - S[group] * D

    def fit_scale(k: int, members: slice, R: Tensor) -> None:
        d = D[members]
        Hd = H[members, members] @ d
        gain, curvature = (d * R).sum(0).mul_(1 - RELUCTANCE), (d * Hd).sum(0)
        fitted = round_to_fp16((S[k] + (gain / curvature).nan_to_num_(0, 0, 0)).clamp_(-LARGEST_FP16, LARGEST_FP16))
        step = fitted - S[k]
        better = step * curvature * step < 2 * step * gain
        S[k], step = torch.where(better, fitted, S[k]), torch.where(better, step, 0)
        E[members].addcmul_(d, step, value=-1)
        R.addcmul_(Hd, step, value=-1)

    # It is handed to itself: through its closure it would hold all matrices here until the garbage collector comes.
    def choose_codes(k: int, start: int, stop: int, R: Tensor, choose_codes: Callable[..., None]) -> None:
        """R is E H of these columns; they leave what they have added to q in it."""
        if stop - start <= columns.most:
            part = slice(start, stop)
            grid = S[k], lows[k], highs[k]
            return columns.choose(R, D[part], E[part], H[part, part], diagonal[part], *grid, 1 - RELUCTANCE)
        half = (stop - start) // 2
        middle = start + half
        choose_codes(k, start, middle, R[:half], choose_codes)
        R[half:].addmm_(H[start:middle, middle:stop].T, R[:half], alpha=-1)
        choose_codes(k, middle, stop, R[half:], choose_codes)

    for _ in range(sweeps):
        stop = 0
        for k, size in enumerate(sizes):
            start, stop = stop, stop + size
            R = H[start:stop] @ E
            if fit_scales:
                fit_scale(k, slice(start, stop), R)
            choose_codes(k, start, stop, R, choose_codes)

    # Anew, because small changes have added up their rounding.
    E = weight.float().T[order] - S[group] * D
    new = torch.empty_like(codes)
    new[:, order] = (D + Z[group]).to(torch.uint8).T
    return GptqResult(
        codes=new,
        scale=S.T.contiguous(),
        zero_point=zero_point,
        g_idx=g_idx,
        loss=_quadratic(H, E).clamp_(min=0) * mean,
    )


def _quadratic(H: Tensor, E: Tensor) -> Tensor:
    """diag(E^T H E), float64 [O]. E [I, O]. In parts, because all of H E in float64 would take much memory."""
    parts = zip(H.split(TRIANGLE_CHUNK), E.split(TRIANGLE_CHUNK), strict=True)
    return torch.stack([(rows @ E).double().mul_(e).sum(0) for rows, e in parts]).sum(0)
