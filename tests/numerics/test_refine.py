"""What comes before and after GPTQ, against float64, samples and brute force: targets, strengths, bias shifts, coordinate descent."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlm.numerics.gptq import GptqResult, SingularHessian, factorize_in_order, gptq, round_to_nearest
from qlm.numerics.refine import choose_strength, full_shift, refine

# Relative; fp32 solves under a Hessian whose condition the damping of 0.01 holds to 1e4.
SOLVE_TOLERANCE = 1e-4
# Relative; fp32 sums of up to 2^14 terms.
SUM_TOLERANCE = 1e-5
# A loss that has not risen may look so by what fp32 loses of R: codes move only where they gain more than that.
LOSS_TOLERANCE = 1e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def streams(tokens: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x in the float model and x~ in the quantized one: correlated features of different sizes and means; a gain and noise between."""
    mixed = random(tokens, inputs, seed=seed) @ random(inputs, inputs, seed=99) / inputs**0.5
    x = (mixed + random(inputs, seed=98)) * (0.3 + random(inputs, seed=97).abs() ** 2)
    return x, 0.9 * x + 0.2 * random(tokens, inputs, seed=seed + 1)


def moments(x: Tensor, y: Tensor) -> Tensor:
    """E[x y^T] in fp32, summed in float64."""
    return (x.double().T @ y.double() / len(x)).float()


def damped(hessian: Tensor, damp: float) -> Tensor:
    hessian = hessian.double()
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor, g_idx: Tensor) -> Tensor:
    """float64 [O, I]."""
    group = g_idx.long()
    return scale.double()[:, group] * (codes.double() - zero_point.double()[:, group])


def losses(weight: Tensor, quantized: Tensor, hessian: Tensor, damp: float = 0.01) -> Tensor:
    """diag(E H E^T) under the damped Hessian, float64 [O]."""
    E = weight.double() - quantized.double()
    return torch.einsum("oi,ij,oj->o", E, damped(hessian, damp), E)


def loss_of(weight: Tensor, result: GptqResult, hessian: Tensor) -> Tensor:
    return losses(weight, dequantized(result.codes, result.scale, result.zero_point, result.g_idx), hessian)


def refined(weight: Tensor, hessian: Tensor, start: GptqResult, bits: int, sweeps: int, **how: bool) -> GptqResult:
    return refine(weight, hessian, 0.01, start.codes, start.scale, start.zero_point, start.g_idx, bits, sweeps, **how)


def lag_of(weight: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """E[(W x - W x~) x~^T], fp32 [O, I]."""
    return (weight.double() @ (moments(x, seen) - moments(seen, seen)).double()).float()


class TestShift:
    @pytest.mark.parametrize("order", ["none", "act", "static"])
    @pytest.mark.parametrize("damp", [1e-3, 0.01, 1.0])
    def test_is_its_definition(self, damp: float, order: str) -> None:
        x, seen = streams(300, 48)
        weight, H, G = random(20, 48), moments(seen, seen), moments(x, seen)
        added = damped(H, damp) - H.double()
        expected = weight.double() @ (G.double() + added) @ torch.linalg.inv(H.double() + added) - weight.double()
        found = full_shift(lag_of(weight, x, seen), factorize_in_order(H, order, 48, damp))
        assert (found - expected).norm() < SOLVE_TOLERANCE * expected.norm()

    def test_nothing_moves_where_nothing_lacks(self) -> None:
        x, _ = streams(300, 48)
        found = full_shift(torch.zeros(20, 48), factorize_in_order(moments(x, x), "none", 48, 0.01))
        assert torch.equal(found, torch.zeros(20, 48))

    @pytest.mark.parametrize("whole", [False, True], ids=["of the layer", "of the residual stream"])
    def test_gptq_repairs_earlier_layers_through_it(self, whole: bool) -> None:
        """|t - Q x~|^2 + lambda |W - Q|^2 and |(W' - Q) (H + lambda I)^1/2|^2 differ by what does not depend on Q."""
        x, seen = streams(400, 32)
        weight, H = random(6, 32), moments(seen, seen)
        t = x.double() @ weight.double().T + whole * 0.3 * (x[:, :6] - seen[:, 5:11]).double()
        lag = ((t - seen.double() @ weight.double().T).T @ seen.double() / len(x)).float()
        target = weight + full_shift(lag, factorize_in_order(H, "none", 32, 0.01))
        ridge = 0.01 * H.double().diagonal().mean()
        gaps = []
        for seed in range(5):
            Q = (weight + 0.3 * random(6, 32, seed=seed)).double()
            outputs = (t - seen.double() @ Q.T).square().mean(0)
            gaps.append(outputs + ridge * (weight.double() - Q).square().sum(1) - losses(target, Q, H))
        assert (torch.stack(gaps) - gaps[0]).abs().max() < SOLVE_TOLERANCE * gaps[0].abs().max()


class TestStrength:
    @pytest.mark.parametrize("aside_seed", range(4))
    def test_is_the_best_on_what_was_kept_aside(self, aside_seed: int) -> None:
        (x, seen), (x_aside, seen_aside) = streams(150, 64), streams(400, 64, seed=50 + aside_seed)
        weight = random(24, 64)
        shift = full_shift(lag_of(weight, x, seen), factorize_in_order(moments(seen, seen), "none", 64, 0.01))
        found = choose_strength(shift, moments(seen_aside, seen_aside), lag_of(weight, x_aside, seen_aside))

        def error(strength: float) -> float:
            output = seen_aside.double() @ (weight + strength * shift).double().T
            return (x_aside.double() @ weight.double().T - output).square().mean().item()

        assert 0 < found <= 1
        assert error(found) <= min(error(i / 50) for i in range(51)) * (1 + SUM_TOLERANCE)

    def test_ends(self) -> None:
        x, seen = streams(300, 48)
        weight, H = random(20, 48), moments(seen, seen)
        lag = lag_of(weight, x, seen)
        shift = full_shift(lag, factorize_in_order(H, "none", 48, 0.01))
        # Samples aside that want the opposite, and more than all of it.
        assert choose_strength(shift, H, -lag) == 0
        assert choose_strength(shift, H, 2 * lag) == 1
        assert choose_strength(0 * shift, H, lag) == 0
        assert choose_strength(shift, H * 0, lag * 0) == 0


ORDERS = ("gar", "act", "static")
# What two sweeps leave of the error, at most, at 2 to 4 bits: with codes alone, and with the scales. GPTQ itself leaves the less to them
# the better its order is: with "act", whose groups are formed as columns are taken, next to nothing.
WORTH = {"gar": (0.94, 0.93), "act": (0.9995, 0.995), "static": (0.998, 0.985)}


def problem(bits: int, order: str, symmetric: bool, *, inputs: int = 128, group_size: int = 32, search: bool = True):
    """weight, hessian, GPTQ's result."""
    x, _ = streams(2 * inputs, inputs)
    weight, H = random(24, inputs), moments(x, x)
    factor = factorize_in_order(H, order, group_size, 0.01)
    how = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "search": search}
    return weight, H, gptq(weight, factor, static=order == "static", **how)


def local_optimum(weight: Tensor, hessian: Tensor, result: GptqResult, bits: int) -> Tensor:
    """The most that any single code, moved to any other level, lowers its row's loss, relative to it: float64, brute force."""
    H, group = damped(hessian, 0.01), result.g_idx.long()
    E = weight.double() - dequantized(result.codes, result.scale, result.zero_point, result.g_idx)
    R, best = E @ H, torch.zeros(len(weight), dtype=torch.float64)
    for level in range(2**bits):
        move = result.scale.double()[:, group] * (level - result.codes.double())
        change = move * (move * H.diagonal() - 2 * R)
        best = torch.maximum(best, -change.amin(1))
    return best / torch.einsum("oi,oi->o", R, E)


class TestRefine:
    @pytest.mark.parametrize("order", ORDERS)
    def test_no_sweeps_change_nothing(self, order: str) -> None:
        weight, H, start = problem(4, order, False)
        result = refined(weight, H, start, 4, 0)
        for name in ("codes", "scale", "zero_point", "g_idx"):
            assert torch.equal(getattr(result, name), getattr(start, name)), name
        assert torch.allclose(result.loss, start.loss, rtol=SOLVE_TOLERANCE)

    @pytest.mark.parametrize("fit_scales", [False, True], ids=["codes", "codes-and-scales"])
    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("order", ORDERS)
    def test_no_row_loses_more(self, order: str, bits: int, symmetric: bool, fit_scales: bool) -> None:
        weight, H, start = problem(bits, order, symmetric)
        before = loss_of(weight, start, H)
        kept = start.codes.clone(), start.scale.clone(), start.zero_point.clone(), H.clone()
        for _ in range(3):
            result = refined(weight, H, start, bits, 1, fit_scales=fit_scales)
            after = loss_of(weight, result, H)
            assert (after <= before * (1 + LOSS_TOLERANCE)).all()
            assert torch.allclose(result.loss, after, rtol=SOLVE_TOLERANCE)
            before, start = after, result
        # The arguments are left alone, what is stored is what a file can hold.
        assert torch.equal(H, kept[3])
        assert torch.equal(result.zero_point, kept[2])
        assert result.codes.dtype == torch.uint8
        assert result.codes.max() <= 2**bits - 1
        assert torch.equal(result.scale, result.scale.half().float())
        if not fit_scales:
            assert torch.equal(result.scale, kept[1])

    @pytest.mark.parametrize("group_size", [32, 128])
    def test_leaves_its_arguments_alone(self, group_size: int) -> None:
        weight, H, start = problem(4, "none", False, group_size=group_size)
        kept = {name: getattr(start, name).clone() for name in ("codes", "scale", "zero_point", "g_idx")}
        result = refined(weight, H, start, 4, 1)
        assert not torch.equal(result.scale, start.scale)
        for name, value in kept.items():
            assert torch.equal(getattr(start, name), value), name

    @pytest.mark.parametrize("bits", [2, 3, 4])
    @pytest.mark.parametrize("order", ORDERS)
    def test_is_worth_it(self, order: str, bits: int) -> None:
        weight, H, start = problem(bits, order, True)
        codes = refined(weight, H, start, bits, 2, fit_scales=False).error
        both = refined(weight, H, start, bits, 2).error
        of_codes, of_both = WORTH[order]
        assert codes < of_codes * start.error
        assert both < min(codes, of_both * start.error)

    def test_arguments_are_left_alone(self) -> None:
        weight, H, start = problem(3, "gar", True)
        before = [t.clone() for t in (weight, H, start.codes, start.scale, start.zero_point, start.g_idx)]
        refined(weight, H, start, 3, 2)
        for old, new in zip(before, (weight, H, start.codes, start.scale, start.zero_point, start.g_idx), strict=True):
            assert torch.equal(old, new)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("bits", [2, 3])
    def test_ends_where_no_single_code_is_better(self, order: str, bits: int) -> None:
        weight, H, start = problem(bits, order, False)
        assert local_optimum(weight, H, start, bits).max() > 0.005
        result = refined(weight, H, start, bits, 30, fit_scales=False)
        # Codes move only for a gain beyond RELUCTANCE of a step.
        assert local_optimum(weight, H, result, bits).max() < 1e-4
        assert torch.equal(refined(weight, H, result, bits, 1, fit_scales=False).codes, result.codes)

    def test_ends_where_no_neighbouring_scale_is_better(self) -> None:
        weight, H, start = problem(3, "gar", True)
        result = refined(weight, H, start, 3, 40)
        reached = loss_of(weight, result, H)
        for group, factor in itertools.product(range(result.scale.shape[1]), (1 - 2.0**-9, 1 + 2.0**-9)):
            scale = result.scale.clone()
            scale[:, group] = (scale[:, group] * factor).half().float()
            moved = losses(weight, dequantized(result.codes, scale, result.zero_point, result.g_idx), H)
            assert (moved >= reached * (1 - 1e-3)).all()

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 1000), st.integers(1, 5), st.booleans())
    def test_small_ones_against_every_choice_there_is(self, seed: int, inputs: int, negative: bool) -> None:
        """2 bits, up to 5 columns: never below the global optimum, and from it nowhere else."""
        x = random(20, inputs, seed=seed) @ random(inputs, inputs, seed=seed + 1)
        weight, H = random(3, inputs, seed=seed + 2), moments(x, x)
        scale = torch.full((3, 1), -0.5 if negative else 0.5)
        zero, g_idx = torch.full((3, 1), 2, dtype=torch.int32), torch.zeros(inputs, dtype=torch.int32)
        every = torch.tensor(list(itertools.product(range(4), repeat=inputs)), dtype=torch.uint8)
        all_losses = torch.stack([losses(weight, dequantized(c.expand(3, -1), scale, zero, g_idx), H) for c in every])
        best, place = all_losses.min(0)
        for codes in (every[place], every[-1].expand(3, -1), every[0].expand(3, -1)):
            result = refine(weight, H, 0.01, codes, scale, zero, g_idx, 2, 8, fit_scales=False)
            reached = loss_of(weight, result, H)
            assert (reached >= best * (1 - LOSS_TOLERANCE)).all()
            assert (reached <= losses(weight, dequantized(codes, scale, zero, g_idx), H) * (1 + LOSS_TOLERANCE)).all()
            if inputs == 1:
                assert torch.allclose(reached, best, rtol=3e-3)
        assert local_optimum(weight, H, result, 2).max() < 5e-3

    def test_groups_of_any_kind(self) -> None:
        """Scattered, of different sizes, one of them without members."""
        x, _ = streams(200, 96)
        weight, H = random(10, 96), moments(x, x)
        g_idx = torch.randint(0, 4, (96,), generator=torch.Generator().manual_seed(0)) + 1
        g_idx[g_idx == 3] = 0
        scale, zero = 0.3 + 0.2 * random(10, 5).abs().half().float(), torch.full((10, 5), 4, dtype=torch.int32)
        scale = scale.half().float()
        scale[::2] *= -1
        codes = torch.randint(0, 8, (10, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        before = losses(weight, dequantized(codes, scale, zero, g_idx), H)
        result = refine(weight, H, 0.01, codes, scale, zero, g_idx, 3, 6)
        after = loss_of(weight, result, H)
        assert (after < 0.1 * before).all()
        assert torch.equal(result.scale[:, 3], scale[:, 3])
        assert torch.equal(result.g_idx, g_idx)
        # The same, with columns renamed.
        places = g_idx.argsort(stable=True)
        again = refine(
            weight[:, places], H[places][:, places], 0.01, codes[:, places], scale, zero, g_idx[places], 3, 6
        )
        assert torch.equal(again.codes, result.codes[:, places])
        assert torch.equal(again.scale, result.scale)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_rounding_to_nearest_is_kept_under_the_unit_hessian(self, bits: int) -> None:
        weight, g_idx = random(16, 96), torch.arange(96) // 32
        start = round_to_nearest(weight, g_idx, bits=bits, symmetric=False, search=True)
        assert torch.equal(refined(weight, torch.eye(96), start, bits, 2, fit_scales=False).codes, start.codes)

    @pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
    def test_size_of_the_hessian_does_not_matter(self, size: float) -> None:
        weight, H, start = problem(3, "gar", True)
        one, two = refined(weight, H, start, 3, 2), refined(weight, H * size, start, 3, 2)
        assert (one.codes != two.codes).float().mean() < 1e-3
        assert two.error == pytest.approx(one.error * size**0.5, rel=1e-3)

    @pytest.mark.parametrize(
        "inputs",
        [
            lambda x: x[:, :1] * x[:1],
            lambda x: x[:10],
            lambda x: x[:, :1].expand(-1, x.shape[1]),
            lambda x: torch.cat([x[:, :1] * 1e4, x[:, 1:]], 1),
            lambda x: torch.cat([x[:1] * 1e4, x[1:]]),
            lambda x: x * (torch.arange(x.shape[1]) % 2),
            torch.ones_like,
        ],
        ids=["rank-1", "few-samples", "equal-columns", "outlier-1e4", "huge-token", "half-dead", "constant"],
    )
    @pytest.mark.parametrize(
        "weights",
        [lambda w: w, lambda w: w * 0, lambda w: w * 1e-30, lambda w: w * 2.0**-20, lambda w: w.clamp(-1, 1) * 65504,
         lambda w: w[:, :1].expand_as(w).contiguous()],
        ids=["normal", "zero", "size-1e-30", "fp16-subnormal", "65504", "constant-rows"],
    )  # fmt: skip
    def test_faults_raise_no_loss(self, inputs, weights) -> None:
        weight, x = weights(random(12, 64)), inputs(streams(200, 64)[0])
        H = moments(x, x)
        start = round_to_nearest(weight, torch.arange(64) // 32, bits=3, symmetric=True, search=True)
        result = refined(weight, H, start, 3, 3)
        before, after = loss_of(weight, start, H), loss_of(weight, result, H)
        assert result.loss.isfinite().all()
        assert result.scale.isfinite().all()
        assert (result.scale != 0).all()
        # What fp32 loses of a quadratic form, relative to the largest that it could be.
        rounding = 1e-9 * H.double().diagonal().max() * weight.double().square().sum(1)
        assert (after <= before * (1 + LOSS_TOLERANCE) + rounding).all()

    @pytest.mark.parametrize("hessian", [torch.zeros(32, 32), torch.full((32, 32), float("nan")), -torch.eye(32)])
    def test_hopeless_hessians_are_refused(self, hessian: Tensor) -> None:
        start = round_to_nearest(random(4, 32), torch.zeros(32), bits=4, symmetric=True, search=False)
        with pytest.raises(SingularHessian):
            refined(random(4, 32), hessian, start, 4, 1)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_non_finite_weights_are_refused(self, value: float) -> None:
        weight = random(4, 32)
        start = round_to_nearest(weight, torch.zeros(32), bits=4, symmetric=True, search=False)
        weight[3, 31] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            refined(weight, torch.eye(32), start, 4, 1)

    def test_the_same_bytes_twice(self) -> None:
        weight, H, start = problem(3, "act", False)
        one, two = (refined(weight.clone(), H.clone(), start, 3, 2) for _ in range(2))
        for name in ("codes", "scale", "zero_point", "g_idx", "loss"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name

    def test_rows_are_independent(self) -> None:
        weight, H, start = problem(4, "gar", True)
        whole = refined(weight, H, start, 4, 2)
        part = refine(
            weight[5:9], H, 0.01, start.codes[5:9], start.scale[5:9], start.zero_point[5:9], start.g_idx, 4, 2
        )
        assert (part.codes != whole.codes[5:9]).float().mean() < 1e-2
        assert torch.allclose(part.loss, whole.loss[5:9], rtol=1e-3)
