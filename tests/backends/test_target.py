"""The weight that calibrated backends come near to, and the bias that goes with it, against float64 and plain least squares."""

import pytest
import torch
from torch import Tensor

from qlm.backends.base import Statistics
from qlm.backends.target import bias_shift_of, target_of
from qlm.numerics.gptq import factorize
from tests.backends.conftest import random, settings_of

DAMP = 0.01
# fp32 solves of 64 columns with a damping of 0.01.
TOLERANCE = 1e-4


def statistics_of(x: Tensor, target: Tensor, held_out: Statistics | None = None) -> Statistics:
    """x, target [T, I]: the input in the quantized model and in the float one."""
    n = len(x)
    return Statistics(
        x.T @ x / n, n, mean=x.mean(0), cross=target.T @ x / n, target_mean=target.mean(0), held_out=held_out
    )


def streams(tokens: int, seed: int, gain: float = 0.9) -> tuple[Tensor, Tensor]:
    """A float stream, and one that differs from it by a gain and noise."""
    target = random(tokens, 64, seed=seed) @ random(64, 64, seed=99)
    return gain * target + 0.5 * random(tokens, 64, seed=seed + 1), target


def factor_of(statistics: Statistics):
    return factorize(statistics.hessian, torch.arange(64), DAMP)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_shift_is_damped_least_squares(strength: float) -> None:
    x, target = streams(500, 1)
    weight, statistics = random(32, 64), statistics_of(x, target)
    settings = settings_of("gptq", target_shift=strength, damp=DAMP)
    found, used = target_of(weight, statistics, settings, factor_of(statistics))
    H, G = (x.double().T @ x.double()) / 500, (target.double().T @ x.double()) / 500
    damped = DAMP * H.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    full = weight.double() @ (G + damped) @ torch.linalg.inv(H + damped)
    expected = weight.double() + strength * (full - weight.double())
    assert used == strength
    assert (found - expected).norm() / expected.norm() < TOLERANCE
    if strength == 0:
        assert torch.equal(found, weight)


def test_auto_is_the_best_on_what_was_kept_aside() -> None:
    x, target = streams(500, 1)
    aside_x, aside_target = streams(200, 7)
    statistics = statistics_of(x, target, statistics_of(aside_x, aside_target))
    weight, factor = random(32, 64), factor_of(statistics)
    found, used = target_of(weight, statistics, settings_of("gptq", target_shift="auto"), factor)

    def error(strength: float) -> float:
        candidate, _ = target_of(weight, statistics, settings_of("gptq", target_shift=strength), factor)
        return float((aside_target @ weight.T - aside_x @ candidate.T).square().mean())

    assert 0 < used <= 1
    assert error(used) <= min(error(i / 20) for i in range(21)) * (1 + TOLERANCE)
    candidate, _ = target_of(weight, statistics, settings_of("gptq", target_shift=used), factor)
    assert (found - candidate).norm() / found.norm() < TOLERANCE


def test_auto_without_anything_aside_is_off() -> None:
    statistics = statistics_of(*streams(500, 1))
    weight = random(32, 64)
    found, used = target_of(weight, statistics, settings_of("gptq", target_shift="auto"), factor_of(statistics))
    assert used == 0
    assert torch.equal(found, weight)


def test_auto_does_not_follow_noise() -> None:
    """What was kept aside comes from elsewhere, where the shift does harm: it is left out."""
    x, target = streams(100, 1)
    aside_x, aside_target = streams(200, 7, gain=1.6)
    statistics = statistics_of(x, target, statistics_of(aside_x, aside_target))
    _, used = target_of(random(32, 64), statistics, settings_of("gptq", target_shift="auto"), factor_of(statistics))
    assert used == 0


def test_the_sum_in_the_residual_stream_is_what_counts() -> None:
    """Where it is known, in the place of the layer's own output: also for the bias, about the means."""
    x, target = streams(500, 1)
    x, target = x + 0.5, target - 0.2
    weight = random(32, 64)
    others, float_others = random(500, 32, seed=3), random(500, 32, seed=3) + 0.1 * x[:, :32] + 0.3
    sums, float_sums = others + x @ weight.T, float_others + target @ weight.T

    def of(rows: slice, held_out: Statistics | None = None) -> Statistics:
        a, lag = x[rows].double(), (float_sums - sums)[rows].double()
        mean, n = a.mean(0), len(a)
        centered = a - mean
        return Statistics(
            (centered.T @ centered / n).float(), n, mean.float(), lag=((lag - lag.mean(0)).T @ centered / n).float(),
            mean_lag=lag.mean(0).float(), held_out=held_out,
        )  # fmt: skip

    statistics = of(slice(0, 400), of(slice(400, None)))
    settings = settings_of("gptq", target_shift="auto", bias_correction=True, damp=1e-4)
    factor = factorize(statistics.hessian, torch.arange(64), 1e-4)
    found, used = target_of(weight, statistics, settings, factor)
    assert used > 0.9
    quantized = (found * 8).round() / 8
    shift = bias_shift_of(weight, quantized, statistics, settings)
    assert shift is not None

    def lost(Q: Tensor, bias: Tensor | float) -> Tensor:
        return (float_sums - others - x @ Q.T - bias)[:400].double()

    assert lost(quantized, shift).mean(0).abs().max() < TOLERANCE * float_sums.abs().mean()
    # Least squares with an intercept, by itself.
    with_one = torch.cat([x[:400], torch.ones(400, 1)], 1).double()
    best = torch.linalg.lstsq(with_one, (float_sums - others)[:400].double()).solution
    residue = ((float_sums - others)[:400].double() - with_one @ best).square().mean()
    bias = bias_shift_of(weight, found, statistics, settings)
    assert lost(found, bias).square().mean() < 1.02 * residue + 1e-3 * lost(weight, 0.0).square().mean()


def test_without_a_float_stream_the_weight_is_the_target() -> None:
    x, _ = streams(100, 1)
    statistics = Statistics(x.T @ x / 100, 100)
    weight = random(32, 64)
    found, used = target_of(weight, statistics, settings_of("gptq", target_shift=1.0), factor_of(statistics))
    assert used == 0
    assert torch.equal(found, weight)


def test_bias_shift_takes_the_mean_error_off() -> None:
    x, target = streams(500, 1)
    x, target = x + 0.5, target - 0.2
    weight = random(32, 64)
    quantized = (weight * 4).round() / 4
    statistics = statistics_of(x, target)
    shift = bias_shift_of(weight, quantized, statistics, settings_of("gptq", bias_correction=True))
    assert shift is not None
    error = target.double() @ weight.double().T - (x.double() @ quantized.double().T + shift.double())
    assert error.mean(0).abs().max() < TOLERANCE * (target @ weight.T).abs().mean()
    assert bias_shift_of(weight, quantized, statistics, settings_of("gptq", bias_correction=False)) is None
    assert bias_shift_of(weight, quantized, None, settings_of("gptq", bias_correction=True)) is None
