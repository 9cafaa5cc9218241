"""int8 under a Hessian: against float64 in another form, the plain rounding it must never be worse than, and the kernel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlm.kernels.ops import int8_linear_reference, int8_row_sum, quantize_activation_per_token
from qlm.numerics.affine import quantize_weight_per_channel_absmax
from qlm.numerics.gptq import SingularHessian, column_order, factorize
from qlm.numerics.int8 import (
    Int8Result,
    compensated,
    outliers,
    quantize_int8_under,
    refined,
    round_per_token,
    row_errors,
    search_scale,
)

OFF = dict(damp=0.01, search=False, compensate=False, sweeps=0)
ALL = dict(damp=0.01, search=True, compensate=True, sweeps=2)
# Relative: float32 sums of up to 2^14 products.
SUM_TOLERANCE = 1e-4
# In steps of the grid: how far a repaired weight in float32 may lie from float64's, with a Hessian of condition 1e4.
STEP_TOLERANCE = 2e-3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated, of different sizes, with a few large ones and means that are not zero."""
    mixed = random(tokens, features, seed=seed) @ (
        0.7 * random(features, features, seed=seed + 1) / math.sqrt(features) + torch.eye(features)
    )
    return (mixed + random(features, seed=seed + 3)) * (0.3 + random(features, seed=seed + 2).abs() ** 3)


def hessian_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def damped(hessian: Tensor, damp: float) -> Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def true_errors(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """float64 [O], summed in another order than the module's."""
    E = weight.double() - codes.double() * scale.double()
    return torch.einsum("oi,ij,oj->o", E, hessian.double(), E)


class TestQuantizeInt8Under:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_with_everything_off_it_is_plain_rounding(self, dtype: torch.dtype) -> None:
        weight = random(40, 96).to(dtype)
        result = quantize_int8_under(weight, hessian_of(inputs(500, 96)), **OFF)
        codes, scale = quantize_weight_per_channel_absmax(weight)
        assert torch.equal(result.codes, codes)
        assert torch.equal(result.scale, scale)

    @pytest.mark.parametrize("options", [OFF, ALL], ids=["off", "all"])
    def test_error_is_its_definition(self, options: dict) -> None:
        weight, hessian = random(40, 96), hessian_of(inputs(500, 96))
        result = quantize_int8_under(weight, hessian, **options)
        expected = true_errors(weight, result.codes, result.scale, hessian).sum().sqrt().item()
        assert result.error == pytest.approx(expected, rel=SUM_TOLERANCE)

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 9), st.integers(1, 150), st.integers(1, 300), st.sampled_from([1.0, 1e-3, 1e-12, 1e6]),
        st.sampled_from([0.0, 1e-4, 0.01, 1.0]), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 1000),
    )  # fmt: skip
    def test_no_row_is_worse_than_plain(
        self, rows: int, columns: int, tokens: int, size: float, damp: float, search: bool, compensate: bool, sweeps: int,
        seed: int,
    ) -> None:  # fmt: skip
        weight, x = random(rows, columns, seed=seed) * size, inputs(tokens, columns, seed=seed)
        weight[0, 0] *= 30  # an outlier, which a scale search may clip
        hessian = hessian_of(x)
        result = quantize_int8_under(weight, hessian, damp=damp, search=search, compensate=compensate, sweeps=sweeps)
        assert (result.codes.dtype, result.scale.dtype) == (torch.int8, torch.float32)
        assert (result.codes.shape, result.scale.shape) == (weight.shape, (rows, 1))
        assert result.codes.min() >= -127
        assert result.scale.isfinite().all()
        assert (result.scale > 0).all()
        found = true_errors(weight, result.codes, result.scale, hessian)
        plain = true_errors(weight, *quantize_weight_per_channel_absmax(weight), hessian)
        # What float32 cannot tell apart: its rounding of a product of W's and H's size.
        noise = 1e-6 * (weight.double().square().sum(1) * hessian.double().diagonal().sum())
        assert (found <= plain * (1 + SUM_TOLERANCE) + 1e-6 * noise).all()

    def test_each_part_is_worth_it(self) -> None:
        """On inputs as correlated as a LayerNorm's: compensation takes most of the error, sweeps some of the rest."""
        x = random(4000, 32, seed=5) @ random(32, 128, seed=6) + 0.1 * random(4000, 128, seed=7)
        weight, hessian = random(64, 128), hessian_of(x)
        options = dict(damp=1e-4, search=False, compensate=False, sweeps=0)
        plain = quantize_int8_under(weight, hessian, **options).error
        alone = quantize_int8_under(weight, hessian, **{**options, "compensate": True}).error
        swept = quantize_int8_under(weight, hessian, **{**options, "compensate": True, "sweeps": 2}).error
        assert alone < 0.5 * plain
        assert swept < 0.98 * alone

    def test_search_clips_where_the_outlier_weighs_little(self) -> None:
        weight = random(8, 256)
        weight[:, 7] = 12.0
        hessian = torch.eye(256)
        hessian[7, 7] = 1e-4
        options = dict(damp=0.0, compensate=False, sweeps=0)
        plain = quantize_int8_under(weight, hessian, search=False, **options)
        found = quantize_int8_under(weight, hessian, search=True, **options)
        assert (found.scale < plain.scale).all()
        assert found.error < 0.9 * plain.error

    def test_what_no_token_excites_is_rounded_to_nearest(self) -> None:
        x = inputs(500, 64)
        x[:, [3, 40]] = 0
        weight = random(16, 64)
        result = quantize_int8_under(weight, hessian_of(x), damp=0.01, search=False, compensate=True, sweeps=0)
        plain, _ = quantize_weight_per_channel_absmax(weight)
        assert torch.equal(result.codes[:, [3, 40]], plain[:, [3, 40]])
        assert not torch.equal(result.codes, plain)

    def test_rows_are_independent(self) -> None:
        weight, hessian = random(24, 64), hessian_of(inputs(500, 64))
        together = quantize_int8_under(weight, hessian, **ALL)
        parts = [quantize_int8_under(part, hessian, **ALL) for part in weight.split(8)]
        assert (together.codes != torch.cat([part.codes for part in parts])).float().mean() < 0.01
        assert together.error == pytest.approx(math.hypot(*(part.error for part in parts)), rel=1e-2)

    @pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e18])
    def test_extreme_rows(self, size: float) -> None:
        weight = random(4, 64)
        weight[1] *= size
        result = quantize_int8_under(weight, hessian_of(inputs(500, 64)), **ALL)
        assert result.scale.isfinite().all()
        assert (result.scale > 0).all()
        back = result.codes.double() * result.scale.double()
        assert (back[1].abs() <= 1.01 * weight[1].abs().max().double()).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_refuses_weights_that_are_not_finite(self, value: float) -> None:
        weight = random(4, 64)
        weight[2, 5] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize_int8_under(weight, torch.eye(64), **ALL)

    def test_refuses_shapes_that_do_not_belong_together(self) -> None:
        with pytest.raises(ValueError, match="Hessian"):
            quantize_int8_under(random(4, 64), torch.eye(65), **ALL)

    def test_refuses_a_hessian_of_zeros_where_it_must_be_factorized(self) -> None:
        with pytest.raises(SingularHessian):
            quantize_int8_under(random(4, 64), torch.zeros(64, 64), **ALL)


class TestParts:
    def test_compensation_is_the_best_repair_of_what_is_rounded_already(self) -> None:
        """Against its meaning in float64: each column is rounded from where the least error given the earlier ones puts it."""
        weight, hessian = random(12, 40), hessian_of(inputs(400, 40))
        _, scale = quantize_weight_per_channel_absmax(weight)
        order = column_order(hessian.diagonal(), "act", 40)
        codes = compensated(weight, factorize(hessian, order, 0.01), scale)
        H, W, s = damped(hessian.double(), 0.01), weight.double(), scale.double()[:, 0]
        error = torch.zeros_like(W)
        for place, j in enumerate(order.tolist()):
            done, rest = order[:place], order[place:]
            moved = W[:, j]
            if place:
                # e_rest = -e_done H_dr H_rr^-1 has the least e H e^T.
                repair = torch.linalg.solve(H[rest][:, rest], H[done][:, rest].T)
                moved = W[:, j] + (error[:, done] @ repair.T)[:, 0]
            code = codes[j].double()
            wanted = (moved / s).clamp(-127, 127)
            assert ((code - wanted).abs() <= 0.5 + STEP_TOLERANCE).all(), f"place {place}"
            error[:, j] = W[:, j] - code * s

    def test_refinement_ends_where_no_code_and_no_scale_can_be_bettered(self) -> None:
        weight, hessian = random(10, 24), damped(hessian_of(inputs(200, 24)), 0.01)
        plain, scale = quantize_weight_per_channel_absmax(weight)
        codes, fitted = refined(weight, plain.T.float(), scale, hessian, 60)
        H, W = hessian.double(), weight.double()

        def loss(codes: Tensor, scale: Tensor) -> Tensor:
            E = W - codes.double().T * scale.double()
            return torch.einsum("oi,ij,oj->o", E, H, E)

        best = loss(codes, fitted)
        assert (best < loss(plain.T, scale)).all()
        for j in range(24):
            for step in (-1, 1):
                other = codes.clone()
                other[j] = (other[j] + step).clamp(-127, 127)
                assert (loss(other, fitted) >= best * (1 - SUM_TOLERANCE)).all()
        for factor in (0.9999, 1.0001):
            assert (loss(codes, fitted * factor) >= best * (1 - SUM_TOLERANCE)).all()

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 6), st.integers(1, 140), st.integers(0, 1000))
    def test_no_sweep_makes_it_worse(self, rows: int, columns: int, seed: int) -> None:
        weight = random(rows, columns, seed=seed)
        hessian = damped(hessian_of(inputs(2 * columns, columns, seed=seed)), 0.01)
        plain, scale = quantize_weight_per_channel_absmax(weight)
        before = true_errors(weight, plain, scale, hessian)
        for sweeps in (1, 2, 3):
            codes, fitted = refined(weight, plain.T.float(), scale, hessian, sweeps)
            now = true_errors(weight, codes.T, fitted, hessian)
            assert (now <= before * (1 + SUM_TOLERANCE)).all()
            before = now

    def test_searched_scales_are_never_worse_under_their_weights(self) -> None:
        weight, importance = random(50, 80), random(80, seed=1).square()
        weight[:, 3] *= 20
        _, scale = quantize_weight_per_channel_absmax(weight)

        def error(scale: Tensor) -> Tensor:
            codes = torch.clamp(torch.round(weight.double() / scale.double()), -127, 127)
            return ((weight.double() - codes * scale.double()) ** 2) @ importance.double()

        found = search_scale(weight, importance, scale)
        assert (error(found) <= error(scale) * (1 + SUM_TOLERANCE)).all()
        assert (error(found) < 0.9 * error(scale)).any()

    def test_row_errors(self) -> None:
        weight, hessian = random(6, 30), hessian_of(inputs(100, 30))
        codes, scale = quantize_weight_per_channel_absmax(weight)
        expected = true_errors(weight, codes, scale, hessian)
        assert torch.allclose(row_errors(weight, codes, scale, hessian), expected, rtol=SUM_TOLERANCE)


class TestRoundPerToken:
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_what_the_kernel_multiplies(self, symmetric: bool, dtype: torch.dtype) -> None:
        x = inputs(60, 48).to(dtype)
        x[3], x[4], x[5] = 0, x[4].abs(), -x[5].abs()
        q, scale, zero_point = quantize_activation_per_token(x, symmetric)
        assert torch.equal(round_per_token(x, symmetric), (q.float() - zero_point) * scale)

    def test_keeps_leading_dimensions_and_zero(self) -> None:
        x = random(3, 5, 16)
        x[..., 2] = 0
        rounded = round_per_token(x)
        assert rounded.shape == x.shape
        assert (rounded[..., 2] == 0).all()
        assert torch.equal(rounded[1], round_per_token(x[1]))

    def test_the_result_in_the_op(self) -> None:
        x, weight, bias = inputs(200, 64), random(32, 64), random(32, seed=9)
        rounded = round_per_token(x)
        result = quantize_int8_under(weight, hessian_of(rounded), **ALL)
        y = int8_linear_reference(x, result.codes, result.scale, int8_row_sum(result.codes), bias, False)
        expected = rounded.double() @ (result.codes.double() * result.scale.double()).T + bias
        assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_result_is_plain_data() -> None:
    result = quantize_int8_under(random(4, 16), torch.eye(16), **OFF)
    assert isinstance(result, Int8Result)
    assert result.damp == 0
    assert result.plain_rows == 4


class TestOutliers:
    def test_counts_what_exceeds_the_median(self) -> None:
        absmax = torch.ones(101)
        absmax[[3, 50]] = torch.tensor([21.0, 400.0])
        absmax[7] = 19.9
        assert outliers(absmax) == (pytest.approx(400.0), [50, 3])

    def test_dead_channels_do_not_hide_them(self) -> None:
        absmax = torch.zeros(100)
        absmax[:10] = 1.0
        absmax[0] = 30.0
        assert outliers(absmax) == (pytest.approx(30.0), [0])

    def test_nothing_alive(self) -> None:
        assert outliers(torch.zeros(10)) == (1.0, [])
