"""What a calibrated backend comes near to: the weight itself, or one that makes up for what earlier layers have lost."""

from torch import Tensor

from qlm.backends.base import Statistics
from qlm.numerics.gptq import Factor
from qlm.numerics.refine import choose_strength, full_shift
from qlm.recipe import LinearSettings


def target_of(weight: Tensor, statistics: Statistics, settings: LinearSettings, factor: Factor) -> tuple[Tensor, float]:
    """The weight to quantize, fp32 [O, I], and the strength of the shift.

    "auto" takes the strength that is best on the samples that were kept aside; without any it is 0.

    Args:
        weight: [O, I], any float dtype.
        factor: of the Hessian in `statistics`.
    """
    weight, strength = weight.float(), settings.target_shift
    aside, lag = statistics.held_out, statistics.lag_of(weight)
    if lag is None or strength == 0:
        return weight, 0.0
    shift = full_shift(lag, factor)
    if strength == "auto":
        lag_aside = None if aside is None else aside.lag_of(weight)
        if aside is None or lag_aside is None:
            return weight, 0.0
        strength = choose_strength(shift, aside.hessian, lag_aside)
    return weight.add(shift, alpha=strength), strength


def bias_shift_of(
    weight: Tensor, quantized: Tensor, statistics: Statistics | None, settings: LinearSettings
) -> Tensor | None:
    """What the mean of each output has lost, to be added to the bias: fp32 [O]; None where nothing is known or wanted.

    W mu' - Q mu, mu and mu' the means of the inputs in the quantized and in the float model; for an output that is added to the
    residual stream, what that stream has lost as well. weight, quantized [O, I].
    """
    mean_lag = None if statistics is None else statistics.mean_lag_of(weight)
    if statistics is None or statistics.mean is None or mean_lag is None or not settings.bias_correction:
        return None
    # In this order: products with each mean alone would lose their difference.
    return (weight.float() - quantized) @ statistics.mean + mean_lag
