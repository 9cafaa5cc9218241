"""int8 weights chosen under the inputs that they will meet: one symmetric grid a row, codes -127 ... 127, scales in fp32.

The format is plain rounding's (`affine.quantize_weight_per_channel_absmax`): only codes and scales differ. What is left afterwards is
mostly the rounding of the activations (`round_per_token`), which no choice of weights repairs: its noise is small in every direction
of the inputs that a calibration text excites, so that a Hessian of rounded inputs gives the same codes in all that matters.
smooth.py makes that noise smaller.

Functions on tensors; on the device of their inputs, in fp32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlm.numerics.affine import RowError, quantize_weight_per_channel_absmax
from qlm.numerics.gptq import Factor, column_order, factorize

LARGEST_CODE = 127
# Columns that are rounded before one product repairs those after them.
BLOCK = 128
# An input feature this many times the median one is called an outlier.
OUTLIER_RATIO = 20.0
# Fractions of max|w| / 127 that the search tries. A row whose weights are normal gains nothing below 0.8 at 8 bits.
SEARCH_FRACTIONS = tuple(round(0.60 + 0.02 * i, 2) for i in range(22))


@dataclass(frozen=True)
class Int8Result:
    """codes int8 [O, I], never -128; scale fp32 [O, 1]; error: sqrt(tr(E H E^T)), E = W - Q, under the Hessian as it was given;
    damp: what the factorization needed, 0 where there was none; plain_rows: rows that stayed with plain rounding."""

    codes: Tensor
    scale: Tensor
    error: float
    damp: float
    plain_rows: int


def quantize_int8_under(
    weight: Tensor, hessian: Tensor, *, damp: float, search: bool, compensate: bool, sweeps: int
) -> Int8Result:
    """Round `weight` to int8 so that tr((W - Q) H (W - Q)^T) is small; no row ends worse than plain rounding has it.

    Args:
        weight: [O, I], any float dtype. Rows are independent: linears that share their input may be stacked.
        hessian: fp32 [I, I], E[x x^T] of the inputs as the linear multiplies them.
        damp: share of the mean of the Hessian's diagonal that is added to it, so that what the calibration text did not
            excite keeps its weights.
        search: choose each row's scale by its error under 1 / U_jj^2 (with `compensate`) or diag H, instead of max|w| / 127.
        compensate: GPTQ (gptq.py) over the grid instead of rounding to nearest.
        sweeps: passes of coordinate descent over the codes, each after a re-fit of the scales.
    Raises:
        ValueError: a weight is NaN, infinite or too large for fp32, or shapes do not belong together.
        SingularHessian: the Hessian cannot be factorized, whatever the damping.
    """
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"a weight {list(weight.shape)} with a Hessian {list(hessian.shape)}; expected [O, I] and [I, I]"
        )
    codes, scale = quantize_weight_per_channel_absmax(weight)
    W, hessian = weight.float(), hessian.float()
    plain_error = row_errors(W, codes, scale, hessian)
    if not bool(plain_error.isfinite().all()):
        raise RowError(
            "the error of its rounding is NaN or infinite: the weights or the Hessian are too large for fp32",
            int(plain_error.isfinite().logical_not().nonzero()[0]),
        )
    if not (search or compensate or sweeps):
        return Int8Result(codes, scale, plain_error.sum().sqrt().item(), 0.0, len(codes))
    factor = None
    if compensate:
        factor = factorize(hessian, column_order(hessian.diagonal(), "act", hessian.shape[0]), damp)
        damp = factor.damp
    mean = hessian.diagonal().mean()
    found_scale = scale
    if search:
        found_scale = search_scale(W, _importance(hessian, factor, damp * mean), scale)
    # Transposed, so that an input's weights are contiguous.
    C = compensated(W, factor, found_scale) if factor is not None else _round(W.T / found_scale.T)
    del factor  # with its inverse twice as large as the Hessian, of which there will be another copy
    if sweeps:
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        C, found_scale = refined(W, C, found_scale, damped, sweeps)
    found = C.T.to(torch.int8).contiguous()
    error = row_errors(W, found, found_scale, hessian)
    better = error < plain_error  # false where anything is NaN
    codes = torch.where(better[:, None], found, codes)
    scale = torch.where(better[:, None], found_scale, scale)
    total = torch.where(better, error, plain_error).sum().sqrt().item()
    return Int8Result(codes, scale, total, damp, len(codes) - int(better.sum()))


def row_errors(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T for each row e of W - Q: float64 [O]. weight fp32 [O, I], codes int8 [O, I], scale fp32 [O, 1], hessian fp32 [I, I]."""
    E = weight - codes * scale
    return ((E @ hessian) * E).sum(1, dtype=torch.float64).clamp_(min=0)


def search_scale(weight: Tensor, importance: Tensor, scale: Tensor) -> Tensor:
    """Among fractions of `scale`, each row's that has the least sum_j importance_j (w_j - q_j)^2: fp32 [O, 1].

    Args:
        weight: fp32 [O, I]. importance: fp32 [I]. scale: fp32 [O, 1].
    """
    best_scale, best = scale, _grid_error(weight, importance, scale)
    for fraction in SEARCH_FRACTIONS:
        tried = (scale * fraction).clamp_(min=torch.finfo(torch.float32).tiny)
        error = _grid_error(weight, importance, tried)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better[:, None], tried, best_scale)
    return best_scale


def compensated(weight: Tensor, factor: Factor, scale: Tensor) -> Tensor:
    """GPTQ's codes on the grids that `scale` gives, in fp32, one row for each input: [I, O].

    Args:
        weight: fp32 [O, I]. scale: fp32 [O, 1]. factor: of the damped Hessian.
    """
    U, order, s = factor.U, factor.order, scale[:, 0]
    I, O = len(order), len(weight)
    W = weight.T[order].contiguous()
    C = torch.empty_like(W)
    for start in range(0, I, BLOCK):
        stop = min(start + BLOCK, I)
        E = torch.empty((stop - start, O), device=W.device)
        for j in range(start, stop):
            C[j] = _round(W[j] / s)
            e = E[j - start]
            torch.sub(W[j], C[j] * s, out=e)
            e.div_(U[j, j])
            W[j + 1 : stop].addr_(U[j, j + 1 : stop], e, alpha=-1)
        W[stop:].addmm_(U[start:stop, stop:].T, E, alpha=-1)
    codes = torch.empty_like(C)
    codes[order] = C
    return codes


def refined(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Coordinate descent: in turn the best scale for the codes, and for each input the best code given all others'.

    Neither step makes tr((W - Q) H (W - Q)^T) larger (QuantEase, arXiv:2309.01885, section 3, for the codes).

    Args:
        weight: fp32 [O, I]. codes: fp32 [I, O]. scale: fp32 [O, 1]. hessian: fp32 [I, I], positive diagonal.
    Returns:
        codes and scale, new tensors of the same shapes.
    """
    W, C, s = weight.T.contiguous(), codes.clone(), scale[:, 0]
    diagonal = hessian.diagonal()
    for _ in range(sweeps):
        # R = H (W - Q): the slope of the loss, which every change of a code updates.
        R, HC = hessian @ (W - C * s), hessian @ C
        step = (C * R).sum(0) / (C * HC).sum(0)
        # A row of zeros has no scale to fit; a scale that turned its sign or vanished would be a step too far.
        step = torch.where(step.isfinite() & (s + step > 0.5 * s), step, torch.zeros_like(step))
        s = s + step
        R -= HC * step
        for start in range(0, len(C), BLOCK):
            stop = min(start + BLOCK, len(C))
            D = torch.empty((stop - start, C.shape[1]), device=C.device)
            for j in range(start, stop):
                new = _round(C[j] + R[j] / (diagonal[j] * s))
                d = D[j - start]
                torch.mul(new - C[j], s, out=d)
                C[j] = new
                R[start:stop].addr_(hessian[start:stop, j], d, alpha=-1)
            R[:start].addmm_(hessian[:start, start:stop], D, alpha=-1)
            R[stop:].addmm_(hessian[stop:, start:stop], D, alpha=-1)
    return C, s[:, None]


def round_per_token(x: Tensor, symmetric: bool = False) -> Tensor:
    """The inputs that `int8_linear` multiplies: each token rounded to its own int8 grid, and back. fp32, x's shape [..., I].

    The range always includes 0, as compressed-tensors has it: scale (high - low) / 255 with a whole zero point, or max|x| / 127.5
    without one.
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
    scale = torch.maximum(-low, high) / 127.5 if symmetric else (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.zeros_like(scale) if symmetric else (-128 - low / scale).round_().clamp_(-128, 127)
    return (x / scale).add_(zero_point).round_().clamp_(-128, 127).sub_(zero_point).mul_(scale)


def outliers(absmax: Tensor, ratio: float = OUTLIER_RATIO) -> tuple[float, list[int]]:
    """How far the largest input feature stands out of the median one, and those that do by more than `ratio`, the largest first.

    A token's grid spans its largest feature: with one 20 times the median, the others have 13 of the 256 steps.

    Args:
        absmax: [I], max |x| of each feature. Features that are always zero do not count.
    """
    alive = absmax[absmax > 0]
    if not len(alive):
        return 1.0, []
    over = absmax.float() / alive.float().median()
    found = (over > ratio).nonzero()[:, 0]
    return over.max().item(), found[over[found].argsort(descending=True, stable=True)].tolist()


def _round(codes: Tensor) -> Tensor:
    return codes.round().clamp_(-LARGEST_CODE, LARGEST_CODE)


def _importance(hessian: Tensor, factor: Factor | None, damping: Tensor) -> Tensor:
    """What an error of each input's weights costs: fp32 [I], 1 at most. GPTQ's own, 1 / U_jj^2, or the Hessian's diagonal."""
    if factor is None:
        weights = hessian.diagonal() + damping
        return weights / weights.amax().clamp(min=torch.finfo(torch.float32).tiny)
    weights = torch.empty_like(factor.U.diagonal())
    weights[factor.order] = (factor.U.diagonal().amin() / factor.U.diagonal()).square()
    return weights


def _grid_error(weight: Tensor, importance: Tensor, scale: Tensor) -> Tensor:
    return _round(weight / scale).mul_(scale).sub_(weight).square_() @ importance
