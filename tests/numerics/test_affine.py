"""Affine grids: fp16 scales, full-range symmetric ends, zero points that every reader decodes alike, search never worse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm.numerics.affine import (
    SMALLEST_FP16,
    grid_error,
    minmax_grid,
    quantize_weight_per_channel_absmax,
    round_to_fp16,
    search_grid,
)

BITS = (2, 3, 4, 8)
# A scale is rounded to fp16, 11 significant bits: half a unit in the last place, relative.
FP16_ROUNDING = 2.0**-11

all_bits = pytest.mark.parametrize("bits", BITS)
symmetric_or_not = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantized(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The definition, in float64."""
    weight, scale, zero = weight.double(), scale.double(), zero.double()
    code = torch.clamp(torch.round(weight / scale) + zero, 0, 2**bits - 1)
    return scale * (code - zero)


class TestRoundToFp16:
    def test_is_what_a_file_holds(self) -> None:
        scale = normal(1000) * torch.logspace(-9, 4, 1000)
        rounded = round_to_fp16(scale)
        assert torch.equal(rounded, rounded.half().float())
        normal_range = scale.abs() > 2.0**-14
        error = ((rounded - scale).abs() / scale.abs())[normal_range]
        assert error.max() <= FP16_ROUNDING

    def test_never_underflows_and_keeps_the_sign(self) -> None:
        scale = torch.tensor([1e-30, -1e-30, 1e-45, -1e-45, 2.0**-26])
        assert round_to_fp16(scale).tolist() == [
            SMALLEST_FP16, -SMALLEST_FP16, SMALLEST_FP16, -SMALLEST_FP16, SMALLEST_FP16
        ]  # fmt: skip

    def test_zero_becomes_one(self) -> None:
        assert round_to_fp16(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]

    @pytest.mark.parametrize("value", [65520.0, -1e30, float("inf"), float("nan")])
    def test_refuses_what_fp16_cannot_hold(self, value: float) -> None:
        with pytest.raises(ValueError, match="does not fit into fp16"):
            round_to_fp16(torch.tensor([1.0, value]))


class TestMinmax:
    @all_bits
    @symmetric_or_not
    def test_scales_are_fp16_and_zero_points_portable(self, bits: int, symmetric: bool) -> None:
        scale, zero = minmax_grid(normal(64, 200), bits, symmetric)
        assert torch.equal(scale, scale.half().float())
        assert torch.equal(zero, zero.round())
        assert zero.min() >= 1
        assert zero.max() <= 2**bits - 1
        if symmetric:
            assert (zero == 2 ** (bits - 1)).all()

    @all_bits
    def test_symmetric_grid_holds_the_largest_element(self, bits: int) -> None:
        weight = normal(64, 200)
        scale, zero = minmax_grid(weight, bits, True)
        place = weight.abs().argmax(0)
        largest = weight.gather(0, place[None])[0]
        code = torch.round(largest / scale) + zero
        # The end code, whatever the element's sign; the scale's rounding is the whole error.
        assert (code == 0).all()
        assert (
            (dequantized(largest[None], scale, zero, bits)[0] - largest).abs() / largest.abs()
        ).max() <= FP16_ROUNDING

    @all_bits
    def test_symmetric_grid_is_exact_for_fp16_multiples(self, bits: int) -> None:
        weight = torch.tensor([[0.75, -0.75, 0.5], [-0.25, 0.5, -1.0]])
        scale, zero = minmax_grid(weight, bits, True)
        largest = torch.tensor([0.75, -0.75, -1.0])
        back = dequantized(largest[None], scale, zero, bits)[0]
        assert torch.equal(back, largest.double())
        assert (scale.sign() == -largest.sign()).all()

    @all_bits
    def test_symmetric_tie_prefers_the_negative_end(self, bits: int) -> None:
        scale, _ = minmax_grid(torch.tensor([[1.0], [-1.0]]), bits, True)
        assert scale > 0

    @all_bits
    def test_asymmetric_error_is_at_most_one_step(self, bits: int) -> None:
        weight = normal(64, 500) + normal(500, seed=1) * 0.5
        scale, zero = minmax_grid(weight, bits, False)
        error = (dequantized(weight, scale, zero, bits) - weight).abs()
        # Half a step from rounding, half a step at an end from the zero point's rounding; fp16 rounding of up to 2^bits steps.
        assert (error <= scale * (1 + 2**bits * FP16_ROUNDING)).all()

    @all_bits
    @symmetric_or_not
    @pytest.mark.parametrize("value", [0.3, -0.3, 1e-3, 5e4, -5e4])
    def test_constant_groups_are_held(self, bits: int, symmetric: bool, value: float) -> None:
        # A group without negative weights once lost its largest ones: with zero point 1 its upper end was one step short.
        weight = torch.full((32, 3), value)
        scale, zero = minmax_grid(weight, bits, symmetric)
        error = (dequantized(weight, scale, zero, bits) - weight).abs().max() / abs(value)
        # Below 2^-14 fp16 scales are subnormal and coarser: 1e-3 at 8 bits is 65.8 units of 2^-24, half a unit off at most.
        assert error <= (FP16_ROUNDING if scale.abs().min() > 2.0**-14 else 0.5 / 65)

    @all_bits
    @symmetric_or_not
    @pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30, 1e-40, 1e-45])
    def test_nothing_and_next_to_nothing(self, bits: int, symmetric: bool, value: float) -> None:
        weight = torch.full((32, 3), value)
        scale, zero = minmax_grid(weight, bits, symmetric)
        assert scale.isfinite().all()
        assert (scale != 0).all()
        assert (dequantized(weight, scale, zero, bits).abs() <= max(abs(value), 0)).all()

    @all_bits
    @symmetric_or_not
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -3e38])
    def test_refuses_what_it_cannot_hold(self, bits: int, symmetric: bool, value: float) -> None:
        weight = normal(32, 3)
        weight[5, 1] = value
        with pytest.raises(ValueError, match="fp16"):
            minmax_grid(weight, bits, symmetric)


class TestSearch:
    @all_bits
    @symmetric_or_not
    def test_grid_error_is_its_definition(self, bits: int, symmetric: bool) -> None:
        weight, importance = normal(64, 50), torch.rand(64, generator=torch.Generator().manual_seed(1))
        scale, zero = minmax_grid(weight * 0.7, bits, symmetric)  # so that clamping happens
        expected = (importance.double()[:, None] * (dequantized(weight, scale, zero, bits) - weight) ** 2).sum(0)
        assert torch.allclose(grid_error(weight, importance, scale, zero, bits).double(), expected, rtol=1e-4)

    @settings(max_examples=40, deadline=None)
    @given(
        st.sampled_from(BITS), st.booleans(), st.integers(1, 70), st.integers(1, 9),
        st.sampled_from([1.0, 1e-4, 1e-30, 1e3, 8000.0]), st.floats(-3, 3), st.integers(0, 1000),
    )  # fmt: skip
    def test_never_worse_than_minmax_and_valid(
        self, bits: int, symmetric: bool, rows: int, columns: int, size: float, shift: float, seed: int
    ) -> None:
        weight = (normal(rows, columns, seed=seed) + shift) * size
        importance = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) + 1e-3
        scale, zero = search_grid(weight, importance, bits, symmetric)
        assert torch.equal(scale, scale.half().float())
        assert zero.min() >= 1
        assert zero.max() <= 2**bits - 1
        before = grid_error(weight, importance, *minmax_grid(weight, bits, symmetric), bits)
        assert (grid_error(weight, importance, scale, zero, bits) <= before).all()

    @symmetric_or_not
    def test_is_worth_it_at_low_bits(self, symmetric: bool) -> None:
        weight, importance = normal(128, 400), torch.ones(128)
        found = grid_error(weight, importance, *search_grid(weight, importance, 3, symmetric), 3).mean()
        plain = grid_error(weight, importance, *minmax_grid(weight, 3, symmetric), 3).mean()
        assert found < 0.85 * plain

    @symmetric_or_not
    def test_near_the_largest_fp16_scale(self, symmetric: bool) -> None:
        # The search also tries scales above the min-max scale, which fp16 may not hold any more.
        weight = torch.tensor([[131_000.0], [-131_000.0], [10.0]]) * (1 if symmetric else 0.7)
        scale, _ = search_grid(weight, torch.ones(3), 2, symmetric)
        assert scale.isfinite().all()

    def test_importance_decides(self) -> None:
        weight = torch.cat([torch.full((1, 1), 8.0), torch.full((63, 1), 0.9)])
        outlier_first = torch.cat([torch.full((1,), 1e6), torch.ones(63)])
        outlier_last = torch.cat([torch.full((1,), 1e-6), torch.ones(63)])
        errors = []
        for importance in (outlier_first, outlier_last):
            scale, zero = search_grid(weight, importance, 3, True)
            errors.append((dequantized(weight, scale, zero, 3) - weight).abs().flatten())
        assert errors[0][0] < errors[1][0]
        assert errors[1][1] < errors[0][1]


class TestInt8:
    def test_is_its_definition(self) -> None:
        weight = normal(40, 300)
        codes, scale = quantize_weight_per_channel_absmax(weight)
        assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (40, 1))
        assert (codes.abs().int().amax(1) == 127).all()
        assert codes.min() >= -127
        error = (codes.double() * scale.double() - weight.double()).abs()
        assert (error <= scale * 0.50001).all()
        assert torch.equal(scale, weight.abs().amax(1, keepdim=True) / 127)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes_are_widened(self, dtype: torch.dtype) -> None:
        weight = normal(8, 64).to(dtype)
        for got, expected in zip(
            quantize_weight_per_channel_absmax(weight), quantize_weight_per_channel_absmax(weight.float()), strict=True
        ):
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-37, 1e-30, 1e30, 3e38])
    def test_extreme_rows(self, size: float) -> None:
        weight = normal(4, 64).clamp_(-1, 1)
        weight[1] *= size
        weight[2] = size
        codes, scale = quantize_weight_per_channel_absmax(weight)
        assert scale.isfinite().all()
        assert (scale > 0).all()
        back = codes.double() * scale.double()
        smallest = torch.finfo(torch.float32).tiny * 127
        assert (
            (back - weight.double()).abs() <= torch.maximum(scale.double() * 0.50001, torch.tensor(smallest))
        ).all() or (size < smallest)
        assert (back.abs() <= weight.abs().amax(1, keepdim=True).double() * (1 + 1e-6)).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    @pytest.mark.parametrize("width", [1, 64, 777])
    def test_every_16_bit_value(self, width: int, dtype: torch.dtype) -> None:
        """In order and shuffled, among small and large neighbours: never -128, never more than half a step off."""
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        values = patterns[patterns.isfinite()]
        for order in (
            torch.arange(len(values)),
            torch.randperm(len(values), generator=torch.Generator().manual_seed(0)),
        ):
            weight = torch.nn.functional.pad(values[order], (0, -len(values) % width)).view(-1, width)
            codes, scale = quantize_weight_per_channel_absmax(weight)
            assert codes.min() >= -127
            assert scale.isfinite().all()
            error = (codes.double() * scale.double() - weight.double()).abs()
            assert (error <= scale.double() * 0.50001).all()
            assert ((codes == 0).all(1) | (codes.abs().int().amax(1) == 127)).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_refuses_non_finite(self, value: float) -> None:
        weight = normal(4, 64)
        weight[3, 63] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize_weight_per_channel_absmax(weight)
