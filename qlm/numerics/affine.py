"""Affine grids: which scale and zero point turn a group of weights into integers.

    code = clamp(round(w / scale) + zero_point, 0, 2^bits - 1)          w ~ scale * (code - zero_point)

Functions on tensors; packing the codes is packing.py's work. Every scale returned here for a 2-8 bit grid is exactly
representable in fp16, because that is what the files hold: codes chosen with an unrounded scale would be wrong by up to one
step after a round trip.
"""

import torch
from torch import Tensor

# Fractions of the min-max scale that the search tries beside 1, and the steps in which it then closes in on the best of them: 10 grids
# in all. They lose no more than 27 fractions 0.03 apart do (within 0.2 % at 2 to 4 bits, either way), at 0.4 of the time. Below 0.4
# clipping always costs more than it gains, at 2 bits too; above 1 helps the symmetric grid, whose positive end stops one step short
# of its negative end.
SEARCH_FRACTIONS = (0.55, 0.70, 0.85)
SEARCH_STEPS = (0.075, 0.0375, 0.01875)

SMALLEST_FP16 = 2.0**-24
LARGEST_FP16 = 65504.0


class RowError(ValueError):
    """Weights that cannot be quantized. Attributes: row, the first of the matrix that is to blame."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


def round_to_fp16(scale: Tensor) -> Tensor:
    """The nearest fp16 values, in fp32; a zero becomes 1 (its group is all zeros), and no other value underflows to zero.

    Args:
        scale: fp32 [O].
    Raises:
        RowError: a scale is too large for fp16 or is not finite.
    """
    fits = scale.abs() <= LARGEST_FP16
    if not bool(fits.all()):
        row = int(fits.logical_not().nonzero()[0])
        raise RowError(f"a scale of {scale[row].item():.6g} does not fit into fp16 (largest: {LARGEST_FP16:.0f})", row)
    return _nearest_fp16(torch.where(scale == 0, 1.0, scale))


def _nearest_fp16(scale: Tensor) -> Tensor:
    """As `round_to_fp16`, of scales that fit and none of which is zero."""
    rounded = scale.to(torch.float16).to(torch.float32)
    return torch.where(rounded == 0, scale.sign().mul_(SMALLEST_FP16), rounded)


def overflowing_row(weight: Tensor) -> int | None:
    """The first row of a weight [O, I], fp32, that is too large to be squared; None as a rule."""
    rows = weight.square().sum(1).isfinite().logical_not().nonzero()
    return int(rows[0]) if len(rows) else None


def minmax_grid(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid that spans a group's largest values.

    Symmetric grids use the full range: the element of largest magnitude, with its sign, sits on the end code 0, so that the
    scale may be negative and no code is wasted (as in AutoRound, docs/full_range_sym.md; the usual 2 max|w| / (2^bits - 1) puts
    both ends half a step off). Asymmetric zero points stay in 1 ... 2^bits - 1, which every reader of the GPTQ format decodes alike.

    Args:
        weight: fp32 [g, O], one group of g inputs.
    Returns:
        scale fp32 [O], fp16 values; zero_point fp32 [O], integers.
    """
    levels = 2**bits
    if symmetric:
        low, high = weight.amin(0), weight.amax(0)
        extreme = torch.where(-low >= high, low, high)
        return round_to_fp16(extreme / -(levels // 2)), torch.full_like(extreme, levels // 2)
    low, high = weight.amin(0).clamp_(max=0), weight.amax(0).clamp_(min=0)
    # With a zero point of at least 1 only levels - 2 steps lie above zero: a group without negative weights needs wider ones.
    scale = round_to_fp16(torch.maximum((high - low) / (levels - 1), high / (levels - 2)))
    return scale, (-low / scale).round_().clamp_(1, levels - 1)


def grid_error(weight: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """sum_j importance_j (w_j - scale (code_j - zero_point))^2 for each output: fp32 [O]. weight [g, O], importance [g]."""
    return _level_error(weight, importance, scale, -zero_point, 2**bits - 1 - zero_point)


def _level_error(weight: Tensor, importance: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    levels = (weight / scale).round_()
    torch.clamp(levels, low, high, out=levels)
    return importance @ levels.mul_(scale).sub_(weight).square_()


def search_grid(weight: Tensor, importance: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid of least weighted error among scaled-down (and slightly scaled-up) min-max grids.

    With importance_j = 1 / U_jj^2, U the Cholesky factor of the inverse Hessian, this is the objective that GPTQ's own error
    has ("Proxy-static" in the 2026 study of scale sensitivity). An asymmetric grid tries both neighbouring zero points.

    Args:
        weight: fp32 [g, O]; importance: fp32 [g].
    Returns:
        scale fp32 [O], fp16 values; zero_point fp32 [O], integers. Never worse than `minmax_grid` by `grid_error`.
    """
    full_scale, best_zero = minmax_grid(weight, bits, symmetric)
    most, low = 2**bits - 1, weight.amin(0).clamp_(max=0)
    best, best_fraction = grid_error(weight, importance, full_scale, best_zero, bits), torch.ones_like(full_scale)
    of_symmetric = (best_zero, -best_zero, most - best_zero)

    def scale_of(fraction: Tensor | float) -> Tensor:
        return _nearest_fp16((full_scale * fraction).clamp_(-LARGEST_FP16, LARGEST_FP16))

    def attempt(fraction: Tensor | float) -> None:
        nonlocal best, best_zero, best_fraction
        scale = scale_of(fraction)
        if symmetric:
            grids = [of_symmetric]
        else:
            zero = -low * fraction / scale
            grids = [(z, -z, most - z) for z in (zero.floor().clamp_(1, most), zero.ceil().clamp_(1, most))]
        for zero_point, lowest, highest in grids:
            error = _level_error(weight, importance, scale, lowest, highest)
            better = error < best
            best = torch.fmin(error, best)
            best_fraction = torch.where(better, fraction, best_fraction)
            if not symmetric:
                best_zero = torch.where(better, zero_point, best_zero)

    for fraction in SEARCH_FRACTIONS:
        attempt(fraction)
    for step in SEARCH_STEPS:
        middle = best_fraction
        attempt(middle - step)
        attempt(middle + step)
    return scale_of(best_fraction), best_zero


def quantize_weight_per_channel_absmax(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale an output: scale = max|w| / 127, codes in [-127, 127].

    -128 is never used: u8 x s8 and s8 x s8 kernels that negate an operand overflow on it (reliability of `vpsignb` tricks).

    Args:
        weight: [O, I], any float dtype.
    Returns:
        codes int8 [O, I]; scale fp32 [O, 1], 1 for a row of zeros.
    Raises:
        ValueError: a weight is NaN or infinite.
    """
    weight = weight.float()
    absmax = weight.abs().amax(1, keepdim=True)
    if not bool(absmax.isfinite().all()):
        raise ValueError("a weight is NaN or infinite")
    scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax / 127)
    # A subnormal absmax / 127 may round to zero or far off; such a row is zero for every purpose of a float model.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale
