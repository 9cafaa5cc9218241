"""A scale and a shift for each input feature of linears whose activations are rounded to int8 token by token.

    x = scale x' + shift        W x + b = (W diag scale) x' + (b + W shift)

One grid spans all features of a token, so that small features share the steps that the largest one needs. Scales bring the features
to one size (SmoothQuant, arXiv:2211.10438, equation 4, with standard deviations in place of maxima, which one rare token decides);
shifts take their means off (Outlier Suppression+, arXiv:2304.09145, section 3.1, which takes the middle of the range).

Functions on tensors; which linears these may be done to is `arch` data, and smoothing.py does it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlm.numerics.affine import quantize_weight_per_channel_absmax
from qlm.numerics.int8 import round_per_token

# How much of a feature's size moves from the activations into the weights: 0 nothing, 1 all of it.
STRENGTHS = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)
# Scales stay within so many times their geometric mean: what is folded must fit into 16-bit floats.
LARGEST_RATIO = 256.0
# Of the error that plain rounding of the weights makes, how much is left where GPTQ compensates: 0.05 to 0.6 on the inputs of
# trained models' linears that can be smoothed.
COMPENSATED_SHARE = 0.25
# Output features that errors are measured on: as good as all of them for a choice, and the time does not grow with the layer.
MOST_OUTPUTS = 1024


@dataclass(frozen=True)
class Smoothing:
    """What was chosen.

    Attributes:
        scale: fp32 [I], positive and finite.
        shift: fp32 [I].
        strength: of the scale; 0 where all are 1.
        shifted: whether any shift is used.
        error_ratio: the expected error of the outputs over that without smoothing; 1 where nothing helps.
    """

    scale: Tensor
    shift: Tensor
    strength: float
    shifted: bool
    error_ratio: float


def smooth_scale(activation: Tensor, weight: Tensor, strength: float) -> Tensor:
    """activation^strength / weight^(1 - strength), over its geometric mean: fp32 [I], positive and finite.

    Args:
        activation: [I], the size of each input feature. weight: [I], the largest magnitude of its weights. A feature where either
            is zero gets 1, as all do with strength 0.
    """
    activation, weight = activation.float(), weight.float()
    alive = (activation > 0) & (weight > 0)
    if strength == 0 or not bool(alive.any()):
        return torch.ones_like(activation)
    logs = strength * activation.log() - (1 - strength) * weight.log()
    logs = (logs - logs[alive].mean()).exp()
    return torch.where(alive, logs.clamp(1 / LARGEST_RATIO, LARGEST_RATIO), torch.ones_like(logs))


def choose_smoothing(
    x: Tensor,
    weight: Tensor,
    *,
    tie: Tensor | None = None,
    may_shift: bool = True,
    weight_share: float = COMPENSATED_SHARE,
    strengths: Sequence[float] = STRENGTHS,
) -> Smoothing:
    """The scale and shift of least error in the outputs, by what rounding really does to these inputs and weights.

    The error is that of the activations' rounding plus `weight_share` of that of the weights' plain rounding, each token's weighed by
    1 / (its output's square + the median one): a token with outputs a hundred times the usual decides no more than others.

    Args:
        x: [T, I], inputs. weight: [O, I], all the linears that read them, stacked.
        tie: int64 [I]; features with the same number get the same scale and shift.
        may_shift: try shifts too.
        weight_share: 1 where weights will be rounded to nearest, less where their errors will be compensated.
        strengths: to try; nothing at all is always tried.
    Raises:
        ValueError: shapes do not belong together, or a value is not finite; names the first input feature.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or not len(x):
        raise ValueError(f"inputs {list(x.shape)} and a weight {list(weight.shape)}; expected [T, I] and [O, I]")
    x, weight = x.float(), weight.float()
    if not bool(weight.isfinite().all()):
        raise ValueError("a weight is NaN or infinite")
    bad = ~x.square().sum(0).isfinite()
    if bool(bad.any()):
        what = "too large to be squared in fp32" if bool(x.isfinite().all()) else "NaN or infinite"
        raise ValueError(
            f"{int(bad.sum())} of its {len(bad)} input features are {what} on the calibration text, the first feature "
            f"{int(bad.nonzero()[0])}"
        )
    weight_size = _tied(weight.abs().amax(0), tie, "amax")
    rows = weight[:: -(-len(weight) // MOST_OUTPUTS)]
    outputs = (x - x.mean(0)) @ rows.T
    energy = outputs.square().sum(1)
    share = 1 / (energy + energy.median()).clamp(min=torch.finfo(torch.float32).tiny)

    none = torch.zeros_like(weight_size)
    best_scale, best_shift, best_strength = torch.ones_like(none), none, 0.0
    best = before = _expected_error(x, rows, share, weight_share)
    for shift in (none, _tied(x.mean(0), tie, "mean")) if may_shift else (none,):
        centred = x - shift
        size = _tied(centred.square().mean(0), tie, "mean").sqrt()
        for strength in strengths:
            scale = smooth_scale(size, weight_size, strength)
            error = _expected_error(centred / scale, rows * scale, share, weight_share)
            if error < best:
                best, best_scale, best_shift, best_strength = error, scale, shift, strength
    ratio = best / before if before > 0 else 1.0
    return Smoothing(best_scale, best_shift, best_strength, bool(best_shift.any()), ratio)


def _expected_error(x: Tensor, weight: Tensor, share: Tensor, weight_share: float) -> float:
    """Of the outputs, without their mean error, which a bias can take: weighted sum over tokens. x [T, I], weight [O, I], share [T]."""
    codes, scale = quantize_weight_per_channel_absmax(weight)
    by_activations = (round_per_token(x) - x) @ weight.T
    by_weights = (x - x.mean(0)) @ (codes * scale - weight).T
    by_activations -= by_activations.mean(0)
    total = by_activations.square().sum(1) + weight_share * by_weights.square().sum(1)
    return (total @ share).item()


def _tied(values: Tensor, tie: Tensor | None, reduce: str) -> Tensor:
    """[I], where features that are tied have the largest ("amax") or the mean ("mean") of their values."""
    if tie is None:
        return values
    _, place = tie.unique(return_inverse=True)
    reduced = torch.zeros_like(values).scatter_reduce_(0, place, values, reduce, include_self=False)
    return reduced[place]
