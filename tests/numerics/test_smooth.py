"""Scales and shifts of activations: the formula, what stays untouched, and choices checked with the int8 op itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlm.kernels.ops import int8_linear_reference, int8_row_sum
from qlm.numerics.affine import quantize_weight_per_channel_absmax
from qlm.numerics.smooth import LARGEST_RATIO, STRENGTHS, choose_smoothing, smooth_scale

# Relative; float32 logarithms and exponentials.
FORMULA_TOLERANCE = 1e-5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def op_error(x: Tensor, weight: Tensor) -> float:
    """Mean square of what the int8 op does to the outputs, means taken off; the reference product in float64."""
    codes, scale = quantize_weight_per_channel_absmax(weight)
    y = int8_linear_reference(x, codes, scale, int8_row_sum(codes), None, False)
    error = y.double() - x.double() @ weight.double().T
    return (error - error.mean(0)).square().mean().item()


class TestSmoothScale:
    @pytest.mark.parametrize("strength", [s for s in STRENGTHS if s])
    def test_is_its_formula(self, strength: float) -> None:
        activation, weight = random(50).abs() + 0.1, random(50, seed=1).abs() + 0.1
        expected = activation.double() ** strength / weight.double() ** (1 - strength)
        expected /= expected.log().mean().exp()
        assert torch.allclose(smooth_scale(activation, weight, strength).double(), expected, rtol=FORMULA_TOLERANCE)

    def test_full_strength_brings_features_to_one_size(self) -> None:
        activation = random(50).abs() + 0.1
        sizes = activation / smooth_scale(activation, random(50, seed=1).abs() + 0.1, 1.0)
        assert torch.allclose(sizes, sizes[:1].expand(50), rtol=FORMULA_TOLERANCE)

    @settings(max_examples=50, deadline=None)
    @given(
        st.integers(1, 40), st.floats(0, 1), st.sampled_from([0.0, 1e-40, 1e-30, 1.0, 1e30, 3e38]),
        st.sampled_from([0.0, 1e-40, 1.0, 3e38]), st.integers(0, 100),
    )  # fmt: skip
    def test_always_positive_and_of_bounded_size(
        self, features: int, strength: float, large: float, small: float, seed: int
    ) -> None:
        activation, weight = random(features, seed=seed).abs(), random(features, seed=seed + 1).abs()
        activation[0], weight[-1] = large, small
        scale = smooth_scale(activation, weight, strength)
        assert (scale >= 1 / LARGEST_RATIO).all()
        assert (scale <= LARGEST_RATIO).all()
        dead = (activation == 0) | (weight == 0)
        assert (scale[dead] == 1).all()


class TestChoose:
    def outlying(self) -> tuple[Tensor, Tensor]:
        """Inputs with two features 60 times the others and one far off zero, as large language models have them."""
        x = random(400, 64)
        x[:, [5, 40]] *= 60
        x[:, 7] += 80
        return x, random(48, 64, seed=1) * 0.1

    def test_outliers_cost_little_afterwards(self) -> None:
        x, weight = self.outlying()
        chosen = choose_smoothing(x, weight, weight_share=1.0)
        assert chosen.strength > 0
        assert chosen.shifted
        before = op_error(x, weight)
        after = op_error((x - chosen.shift) / chosen.scale, weight * chosen.scale)
        assert after < 0.2 * before
        assert chosen.error_ratio == pytest.approx(after / before, rel=0.3)

    def test_the_choice_is_the_best_of_the_list(self) -> None:
        """Each strength by the op itself. All tokens are alike here, so that their weights change nothing."""
        x, weight = self.outlying()
        chosen = choose_smoothing(x, weight, weight_share=1.0)
        shift = x.mean(0)
        size = (x - shift).square().mean(0).sqrt()
        errors = {}
        for strength in STRENGTHS:
            scale = smooth_scale(size, weight.abs().amax(0), strength)
            errors[strength] = op_error((x - shift) / scale, weight * scale)
        assert errors[chosen.strength] <= 1.05 * min(errors.values())

    def test_nothing_is_done_where_nothing_helps(self) -> None:
        x = (random(2000, 64) > 0) * 255.0  # whole numbers on a grid of whole steps: rounding costs nothing
        chosen = choose_smoothing(x, random(32, 64, seed=1), weight_share=0.0)
        assert (chosen.strength, chosen.shifted, chosen.error_ratio) == (0.0, False, 1.0)
        assert torch.equal(chosen.scale, torch.ones(64))
        assert torch.equal(chosen.shift, torch.zeros(64))

    def test_no_shift_where_none_may_be(self) -> None:
        x, weight = self.outlying()
        chosen = choose_smoothing(x, weight, may_shift=False)
        assert not chosen.shifted
        assert not chosen.shift.any()

    def test_tied_features_stay_together(self) -> None:
        x, weight = self.outlying()
        tie = torch.arange(64) % 16
        chosen = choose_smoothing(x, weight, tie=tie)
        assert chosen.strength > 0
        for values in (chosen.scale, chosen.shift):
            assert torch.equal(values.view(4, 16), values[:16].expand(4, 16))

    def test_one_token_of_another_size_does_not_decide(self) -> None:
        x, weight = self.outlying()
        usual = choose_smoothing(x, weight, may_shift=False, strengths=(0.3, 0.5, 0.7))
        with_one = x.clone()
        with_one[0] *= 20
        assert choose_smoothing(with_one, weight, may_shift=False, strengths=(0.3, 0.5, 0.7)).strength == usual.strength
        assert choose_smoothing(x[:1] * 1e-30, weight).error_ratio <= 1

    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(1, 60), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1),
        st.sampled_from([0.0, 1e-20, 1.0, 1e6]), st.integers(0, 1000),
    )  # fmt: skip
    def test_never_worse_and_always_usable(
        self, tokens: int, features: int, outputs: int, weight_share: float, size: float, seed: int
    ) -> None:
        x, weight = random(tokens, features, seed=seed) * size, random(outputs, features, seed=seed + 1)
        x[:, 0] *= 100
        weight[:, -1] = 0
        chosen = choose_smoothing(x, weight, weight_share=weight_share)
        assert chosen.error_ratio <= 1
        assert chosen.scale.isfinite().all()
        assert (chosen.scale > 0).all()
        assert chosen.shift.isfinite().all()

    def test_dead_features_are_left_alone(self) -> None:
        x, weight = self.outlying()
        x[:, 3] = 0
        weight[:, 9] = 0
        chosen = choose_smoothing(x, weight)
        assert chosen.scale[3] == 1
        assert chosen.shift[3] == 0
        assert chosen.scale[9] == 1

    @pytest.mark.parametrize(
        ("value", "what"),
        [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (1e30, "too large to be squared")],
    )
    def test_refuses_what_is_not_finite(self, value: float, what: str) -> None:
        x, weight = self.outlying()
        x[3, 7] = value
        with pytest.raises(ValueError, match=f"1 of its {x.shape[1]} input features are {what}.* the first feature 7"):
            choose_smoothing(x, weight)
        x[3, 7], weight[2, 1] = 0, value
        if what == "NaN or infinite":
            with pytest.raises(ValueError, match="a weight is NaN or infinite"):
                choose_smoothing(x, weight)

    @pytest.mark.parametrize(("x", "weight"), [((4, 5), (3, 6)), ((0, 5), (3, 5)), ((4, 2, 5), (3, 5))])
    def test_refuses_shapes_that_do_not_belong_together(self, x: tuple, weight: tuple) -> None:
        with pytest.raises(ValueError, match="expected"):
            choose_smoothing(torch.zeros(x), torch.zeros(weight))
