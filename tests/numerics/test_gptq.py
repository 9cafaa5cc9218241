"""GPTQ against a slow float64 oracle in the paper's own (OBQ) form, its properties, and inputs that nobody should send."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlm.backends.base import Statistics
from qlm.backends.gptq import GptqBackend, GptqFormat
from qlm.errors import DataError
from qlm.numerics.gptq import (
    PIVOT_BATCH,
    TRIANGLE_CHUNK,
    Factor,
    GptqResult,
    SingularHessian,
    add_gram_,
    column_order,
    factorize,
    factorize_by_pivots,
    factorize_in_order,
    finish_hessian_,
    gptq,
    keep_nearest_where_better,
    round_to_nearest,
    row_losses,
    unit_factor,
    weighted_norm,
)
from qlm.recipe import LinearSettings, quantize_section, settings_for

BITS = (2, 3, 4, 8)
ORDERS = ("none", "act", "gar", "static")

# One unit in the last place of fp16: the repaired weights of a group are equal to float64's up to float32 rounding, which may tip
# the rounding of a scale to the next fp16 value.
ONE_FP16_UNIT = 2.0**-10
# How far a repaired weight, in grid steps, may lie from float64's: float32 with a Hessian of condition 1e3 after up to 256 updates.
STEP_TOLERANCE = 2e-3
# Relative to the largest element; a float32 Cholesky factorization of up to 521 columns.
FACTOR_TOLERANCE = 1e-6
# What float32 loses of a quadratic form, relative to the largest that it could be.
ROUNDING = 1e-9
# Relative; float32 sums of up to 2^14 squares.
ERROR_TOLERANCE = 1e-4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """Activations as they are: correlated, of different sizes, with a few large ones."""
    x = random(tokens, inputs, seed=seed) @ (
        random(inputs, inputs, seed=seed + 1) * 0.5 / math.sqrt(inputs) + torch.eye(inputs)
    )
    return x * (1 + 3 * random(inputs, seed=seed + 2).abs() ** 3)


def hessian_of(x: Tensor) -> Tensor:
    hessian = torch.zeros(x.shape[1], x.shape[1])
    add_gram_(hessian, x)
    return finish_hessian_(hessian, len(x))


def damped(hessian: Tensor, damp: float) -> Tensor:
    """float64."""
    hessian = hessian.double()
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def dequantized(result: GptqResult) -> Tensor:
    """float64 [O, I]."""
    group = result.g_idx.long()
    return result.scale.double()[:, group] * (result.codes.double() - result.zero_point.double()[:, group])


def row_error(weight: Tensor, result: GptqResult, hessian: Tensor) -> Tensor:
    """diag(E H E^T) in float64."""
    E = weight.double() - dequantized(result)
    return torch.einsum("oi,ij,oj->o", E, hessian.double(), E)


def solve(weight: Tensor, hessian: Tensor, order: str, *, damp: float = 0.01, **how: Any) -> tuple[GptqResult, Factor]:
    factor = factorize_in_order(hessian, order, how["group_size"], damp)
    return gptq(weight, factor, static=order == "static", **how), factor


def true_error(weight: Tensor, result: GptqResult, hessian: Tensor) -> float:
    """sqrt(tr(E H E^T)) in float64."""
    E = weight.double() - dequantized(result)
    return torch.einsum("oi,ij,oj->", E, hessian, E).sqrt().item()


def minmax_in_float64(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Written from the definition; weight [O, g]. Scales before their rounding to fp16, zero points before theirs."""
    half, top = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        extreme = torch.stack([row[row.abs().argmax()] for row in weight])
        return -extreme / half, torch.full_like(extreme, half)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    scale = torch.maximum((high - low) / top, high / (top - 1))
    return scale, -low / scale


def follow_oracle(
    weight: Tensor,
    hessian: Tensor,
    order: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    got: GptqResult,
    static: bool = False,
) -> int:
    """The paper's method as plainly as can be, in float64: one column at a time; after each, the others are updated by its row of the
    inverse Hessian, and the column is removed from the inverse by one step of Gaussian elimination (equation 3 of the paper).

    Where float64 itself is within a tolerance of another decision (a scale's fp16 rounding, a tie between codes), the oracle takes the
    tested one; everywhere else `got` must agree. Returns how many codes were such ties.
    """
    W = weight.double()[:, order].clone()
    inverse = torch.linalg.inv(hessian[order][:, order])
    ties, top = 0, 2**bits - 1

    def check_grid(group: int, members: Tensor) -> None:
        wanted, wanted_zero = minmax_in_float64(members, bits, symmetric)
        scale, zero = got.scale[:, group].double(), got.zero_point[:, group].double()
        assert torch.equal(scale.float(), scale.half().float())
        assert ((scale - wanted).abs() <= ONE_FP16_UNIT * wanted.abs()).all()
        # The zero point is -low over the rounded scale.
        slack = 0.5 + ONE_FP16_UNIT * top + STEP_TOLERANCE
        assert ((zero - wanted_zero.clamp(1, top)).abs() <= slack).all()

    if static:
        assert torch.equal(got.g_idx.long(), torch.arange(len(order)) // group_size)
        for group, members in enumerate(weight.double().split(group_size, 1)):
            check_grid(group, members)
    for j in range(W.shape[1]):
        input_ = int(order[j])
        group = int(got.g_idx[input_])
        if not static and j % group_size == 0:
            assert (got.g_idx[order[j : j + group_size]] == group).all()
            check_grid(group, W[:, j : j + group_size])
        scale, zero = got.scale[:, group].double(), got.zero_point[:, group].double()
        w = W[:, j]
        exact = w / scale + zero
        code = torch.clamp(torch.round(w / scale) + zero, 0, top)
        found = got.codes[:, input_].double()
        differ = found != code
        near = ((exact - exact.floor() - 0.5).abs() < STEP_TOLERANCE) & ((found - exact).abs() < 0.5 + STEP_TOLERANCE)
        assert (near | ~differ).all(), f"column {j}: {int((differ & ~near).sum())} codes differ"
        ties += int(differ.sum())
        error = (w - scale * (found - zero)) / inverse[j, j]
        W[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1, :] / inverse[j, j]
    return ties


class TestOracle:
    @pytest.mark.parametrize("group_size", [32, 64, 128, -1])
    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("order", ORDERS)
    def test_codes_are_the_papers(self, order: str, bits: int, symmetric: bool, group_size: int) -> None:
        O, I = 6, 256
        group_size = I if group_size == -1 else group_size
        weight, x = random(O, I, seed=bits), correlated_inputs(512, I)
        H = hessian_of(x)
        result, factor = solve(weight, H, order, bits=bits, group_size=group_size, symmetric=symmetric, search=False)
        ties = follow_oracle(
            weight, damped(H, 0.01), factor.order, bits, group_size, symmetric, result, order == "static"
        )
        assert ties <= 2
        expected = row_error(weight, result, damped(H, 0.01))
        assert torch.allclose(result.loss, expected, rtol=2 * ERROR_TOLERANCE, atol=0)
        assert result.error == pytest.approx(expected.sum().sqrt().item(), rel=ERROR_TOLERANCE)

    @pytest.mark.parametrize(
        ("inputs", "group_size"), [(96, 96), (192, 96), (160, 32), (320, 64), (300, 300), (384, 128), (8, 8)]
    )
    def test_awkward_shapes(self, inputs: int, group_size: int) -> None:
        weight, H = random(5, inputs), hessian_of(correlated_inputs(2 * inputs, inputs))
        columns = column_order(H.diagonal(), "gar", group_size)
        result = gptq(weight, factorize(H, columns, 0.01), bits=4, group_size=group_size, symmetric=True, search=False)
        assert follow_oracle(weight, damped(H, 0.01), columns, 4, group_size, True, result) <= 2

    @settings(max_examples=15, deadline=None)
    @given(
        st.sampled_from([(32, 32), (64, 32), (96, 32), (96, 96), (160, 32), (192, 64)]), st.integers(1, 8), st.sampled_from(BITS),
        st.booleans(), st.sampled_from(ORDERS), st.sampled_from([1e-3, 0.01, 0.1, 1.0]), st.integers(0, 100),
    )  # fmt: skip
    def test_any_shape(
        self, shape: tuple[int, int], outputs: int, bits: int, symmetric: bool, order: str, damp: float, seed: int
    ) -> None:
        inputs, group_size = shape
        weight, H = random(outputs, inputs, seed=seed), hessian_of(correlated_inputs(2 * inputs, inputs, seed))
        result, factor = solve(
            weight, H, order, damp=damp, bits=bits, group_size=group_size, symmetric=symmetric, search=False
        )
        follow_oracle(weight, damped(H, damp), factor.order, bits, group_size, symmetric, result, order == "static")
        assert result.error == pytest.approx(true_error(weight, result, damped(H, damp)), rel=ERROR_TOLERANCE)

    @pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
    @pytest.mark.parametrize("order", ORDERS)
    def test_error_is_that_of_what_is_stored(self, order: str, search: bool) -> None:
        weight, H = random(24, 256), hessian_of(correlated_inputs(512, 256))
        result, factor = solve(weight, H, order, bits=3, group_size=64, symmetric=False, search=search)
        assert result.error == pytest.approx(true_error(weight, result, damped(H, 0.01)), rel=ERROR_TOLERANCE)
        W = weight.double()
        norm = torch.einsum("oi,ij,oj->", W, damped(H, 0.01), W).sqrt().item()
        assert weighted_norm(weight, factor) == pytest.approx(norm, rel=ERROR_TOLERANCE)
        E = weight - result.dequantize()
        assert torch.equal(result.dequantize(), dequantized(result).float())
        assert torch.allclose(row_losses(E, factor), result.loss, rtol=2 * ERROR_TOLERANCE, atol=0)


class TestProperties:
    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
    @pytest.mark.parametrize("bits", BITS)
    def test_unit_hessian_is_round_to_nearest(self, bits: int, symmetric: bool) -> None:
        weight = random(16, 256)
        result = gptq(weight, unit_factor(256), bits=bits, group_size=64, symmetric=symmetric, search=False)
        grouped = weight.double().view(16, 4, 64)
        scale, zero = result.scale.double()[..., None], result.zero_point.double()[..., None]
        nearest = torch.clamp(torch.round(grouped / scale) + zero, 0, 2**bits - 1)
        assert torch.equal(result.codes.double().view_as(nearest), nearest)
        assert result.error == pytest.approx((weight.double() - dequantized(result)).norm().item(), rel=ERROR_TOLERANCE)

    @pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("bits", BITS)
    def test_beats_round_to_nearest(self, bits: int, order: str, search: bool) -> None:
        weight, H = random(32, 256), hessian_of(correlated_inputs(1024, 256))
        common = {"bits": bits, "group_size": 64, "symmetric": True}
        nearest = gptq(weight, unit_factor(256), **common, search=False)
        # At 2 bits a min-max grid clips the positive side at half the negative one's, and what the repair adds may fall outside; the
        # more so on grids that were chosen before there were any repairs.
        limit = 0.95 if bits > 2 or (search and order != "static") else 1.25
        result, _ = solve(weight, H, order, **common, search=search)
        assert result.error < limit * true_error(weight, nearest, damped(H, 0.01))

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_search_is_worth_it(self, bits: int) -> None:
        weight, H = random(64, 256), hessian_of(correlated_inputs(1024, 256))
        factor = factorize(H, column_order(H.diagonal(), "gar", 64), 0.01)
        plain, found = (
            gptq(weight, factor, bits=bits, group_size=64, symmetric=True, search=s).error for s in (False, True)
        )
        assert found < plain

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
    def test_rows_are_independent(self, order: str, search: bool) -> None:
        H = hessian_of(correlated_inputs(512, 256))
        parts = [random(n, 256, seed=n) for n in (1, 7, 24)]
        common = {"bits": 4, "group_size": 32, "symmetric": False, "search": search}
        stacked, _ = solve(torch.cat(parts), H, order, **common)
        alone = [solve(part, H, order, **common)[0] for part in parts]
        # Sums over inputs run in another order when the rows are others: what it may tip is a tie.
        assert (stacked.codes != torch.cat([r.codes for r in alone])).float().mean() < 1e-3
        assert torch.allclose(stacked.scale, torch.cat([r.scale for r in alone]), rtol=ONE_FP16_UNIT)
        assert stacked.error == pytest.approx(math.hypot(*(r.error for r in alone)), rel=1e-3)

    @pytest.mark.parametrize("size", [1e-12, 1e-3, 1e3, 1e12])
    def test_size_of_the_hessian_does_not_matter(self, size: float) -> None:
        weight, H = random(16, 128), hessian_of(correlated_inputs(512, 128))
        results = [
            gptq(weight, factorize(h, torch.arange(128), 0.01), bits=3, group_size=32, symmetric=True, search=True)
            for h in (H, H * size)
        ]
        assert (results[0].codes != results[1].codes).float().mean() < 1e-3
        assert results[1].error == pytest.approx(results[0].error * math.sqrt(size), rel=1e-3)

    def test_tiny_hessian_still_searches(self) -> None:
        # 1 / U_jj^2 of inputs around 1e-19 is below float32's range.
        weight, H = random(16, 128), hessian_of(correlated_inputs(512, 128))
        small = factorize(H * 2.0**-124, torch.arange(128), 0.01)
        plain, found = (gptq(weight, small, bits=3, group_size=32, symmetric=True, search=s) for s in (False, True))
        assert not torch.equal(plain.scale, found.scale)

    def test_powers_of_two_move_only_the_scale(self) -> None:
        weight, H = random(16, 128), hessian_of(correlated_inputs(512, 128))
        factor = factorize(H, torch.arange(128), 0.01)
        common = {"bits": 4, "group_size": 32, "symmetric": True, "search": True}
        one, eighth = gptq(weight, factor, **common), gptq(weight / 8, factor, **common)
        assert torch.equal(one.codes, eighth.codes)
        assert torch.equal(one.scale / 8, eighth.scale)

    def test_contiguous_act_order_is_stored_as_plain_groups(self) -> None:
        H = torch.diag(torch.arange(128, 0, -1).float())
        factor = factorize(H, column_order(H.diagonal().flip(0), "act", 32), 0.01)
        result = gptq(random(8, 128), factor, bits=4, group_size=32, symmetric=True, search=False)
        assert torch.equal(result.g_idx, (torch.arange(128) // 32).int())
        assert (
            (random(8, 128).double() - dequantized(result)).abs() <= result.scale.abs().double()[:, result.g_idx.long()]
        ).all()

    def test_act_order_stores_a_permutation(self) -> None:
        H = hessian_of(correlated_inputs(512, 128))
        factor = factorize(H, column_order(H.diagonal(), "act", 32), 0.01)
        result = gptq(random(8, 128), factor, bits=4, group_size=32, symmetric=True, search=False)
        assert torch.equal(result.g_idx.bincount(), torch.full((4,), 32))
        assert result.g_idx.dtype == torch.int32
        assert not torch.equal(result.g_idx, (torch.arange(128) // 32).int())


class TestColumnOrder:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 6), st.sampled_from([8, 32]), st.sampled_from(ORDERS), st.integers(0, 1000), st.booleans())
    def test_is_a_permutation_with_its_property(
        self, groups: int, group_size: int, order: str, seed: int, ties: bool
    ) -> None:
        diagonal = random(groups * group_size, seed=seed).abs()
        if ties:
            diagonal = (diagonal * 2).round()
        columns = column_order(diagonal, order, group_size)
        assert sorted(columns.tolist()) == list(range(len(diagonal)))
        if order == "none":
            assert columns.tolist() == sorted(columns.tolist())
        elif order in ("act", "static"):
            assert (diagonal[columns].diff() <= 0).all()
        else:
            owner = (columns // group_size).view(groups, group_size)
            assert (owner == owner[:, :1]).all(), "groups stay contiguous"
            inside = diagonal[columns].view(groups, group_size)
            assert (inside.diff(dim=1) <= 0).all()
            assert (inside[:, 0].diff() <= 0).all()
        assert torch.equal(columns, column_order(diagonal, order, group_size))


def plainly(hessian: Tensor, damp: float) -> Factor:
    return factorize(hessian, torch.arange(len(hessian)), damp)


class TestHessian:
    @pytest.mark.parametrize("inputs", [1, 7, 512, 513, 1100])
    def test_is_the_mean_of_outer_products(self, inputs: int) -> None:
        x = random(50, inputs)
        hessian = torch.zeros(inputs, inputs)
        for part in x.split(16):
            add_gram_(hessian, part)
        finish_hessian_(hessian, 50)
        assert torch.allclose(hessian, hessian.T, rtol=1e-5, atol=1e-6)
        assert torch.allclose(hessian.double(), x.double().T @ x.double() / 50, atol=1e-5)

    def test_sixteen_bit_inputs_are_summed_in_float32(self) -> None:
        x = (random(64, 16) * 300).half()  # squares that fp16 cannot hold
        assert torch.allclose(hessian_of(x), hessian_of(x.float()))

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("damp", [1e-3, 0.01, 1.0])
    def test_factor_is_that_of_the_inverse(self, order: str, damp: float) -> None:
        H = hessian_of(correlated_inputs(512, 128))
        columns = column_order(H.diagonal(), order, 32)
        factor = factorize(H, columns, damp)
        assert factor.damp == damp
        assert torch.equal(factor.order, columns)
        assert torch.equal(factor.U, factor.U.triu())
        assert (factor.U.diagonal() > 0).all()
        inverse = torch.linalg.inv(damped(H, damp)[columns][:, columns])
        U = factor.U.double()
        assert ((U.T @ U - inverse).abs().max() / inverse.abs().max()) < 1e-3

    @pytest.mark.parametrize("how", [plainly, factorize_by_pivots])
    def test_leaves_the_hessian_alone(self, how: Callable[[Tensor, float], Factor]) -> None:
        H = hessian_of(correlated_inputs(128, 64))
        before = H.clone()
        how(H, 0.01)
        assert torch.equal(H, before)

    @pytest.mark.parametrize("how", [plainly, factorize_by_pivots])
    def test_damping_rises_until_it_works(self, how: Callable[[Tensor, float], Factor]) -> None:
        x = random(3, 64)
        H = x.T @ x / 3
        assert how(H, 0.01).damp == 0.01
        # Slightly indefinite, as rounding makes it: damping must reach beyond the negative eigenvalue, doubling from what was asked.
        H -= 0.05 * H.diagonal().mean() * torch.eye(64)
        factor = how(H, 0.01)
        steps = math.log2(factor.damp / 0.01)
        assert 0.05 < factor.damp <= 0.16
        assert steps == round(steps)

    @pytest.mark.parametrize("how", [plainly, factorize_by_pivots])
    @pytest.mark.parametrize("seed", range(5))
    def test_no_damping_asked_for(self, seed: int, how: Callable[[Tensor, float], Factor]) -> None:
        x = random(8, 64, seed=seed)
        factor = how(x.T @ x, 0.0)
        assert factor.damp <= 0.01
        assert factor.U.isfinite().all()

    @pytest.mark.parametrize(
        "hessian",
        [torch.zeros(32, 32), torch.full((32, 32), float("nan")), torch.full((32, 32), float("inf")), -torch.eye(32),
         torch.eye(32) - 5, torch.diag(torch.tensor([float("nan")] + [1.0] * 31)),
         torch.eye(32).index_put((torch.tensor([5, 3]), torch.tensor([3, 5])), torch.tensor(float("nan"))),
         torch.eye(32).index_put((torch.tensor([5, 3]), torch.tensor([3, 5])), torch.tensor(float("inf")))],
        ids=["zero", "nan", "inf", "negative", "indefinite", "nan-diagonal", "nan-beside-diagonal", "inf-beside-diagonal"],
    )  # fmt: skip
    @pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
    @pytest.mark.parametrize("how", [plainly, factorize_by_pivots])
    def test_hopeless_ones_are_refused(
        self, hessian: Tensor, damp: float, how: Callable[[Tensor, float], Factor]
    ) -> None:
        with pytest.raises(SingularHessian):
            how(hessian, damp)


def least_pivots(hessian: Tensor, batch: int, chunk: int) -> list[int]:
    """The order by its definition, in float64: what the columns taken so far cannot repair of column j is its variance given them,
    1 / (H_SS^-1)_jj with S the columns taken and j. A batch never crosses a multiple of `chunk`."""
    taken: list[int] = []
    while len(taken) < len(hessian):
        left = [j for j in range(len(hessian)) if j not in taken]
        T = torch.tensor(taken, dtype=torch.int64)
        given = hessian[T][:, left]
        pivots = hessian.diagonal()[left] - (given * torch.linalg.solve(hessian[T][:, T], given)).sum(0)
        count = min(batch, chunk - len(taken) % chunk)
        taken += [left[i] for i in pivots.argsort()[:count].tolist()]
    return taken[::-1]


class TestPivots:
    @pytest.mark.parametrize("inputs", [1, 7, PIVOT_BATCH, PIVOT_BATCH + 1, 100, TRIANGLE_CHUNK + 40])
    def test_order_is_its_definition(self, inputs: int) -> None:
        H = hessian_of(correlated_inputs(2 * inputs + 8, inputs))
        factor = factorize_by_pivots(H, 0.01)
        assert factor.order.tolist() == least_pivots(damped(H, 0.01), PIVOT_BATCH, TRIANGLE_CHUNK)

    @pytest.mark.parametrize("inputs", [1, 7, 100, TRIANGLE_CHUNK, 2 * TRIANGLE_CHUNK + 9])
    @pytest.mark.parametrize("damp", [1e-3, 0.01, 1.0])
    def test_factor_is_that_of_the_hessian_in_this_order(self, inputs: int, damp: float) -> None:
        H = hessian_of(correlated_inputs(2 * inputs, inputs))
        factor = factorize_by_pivots(H, damp)
        assert factor.damp == damp
        assert sorted(factor.order.tolist()) == list(range(inputs))
        assert torch.equal(factor.R, factor.R.triu())
        assert (factor.R.diagonal() > 0).all()
        wanted, R = damped(H, damp)[factor.order][:, factor.order], factor.R.double()
        assert (R @ R.T - wanted).abs().max() < FACTOR_TOLERANCE * wanted.abs().max()

    @pytest.mark.parametrize("seed", range(3))
    def test_less_is_beyond_repair_than_in_other_orders(self, seed: int) -> None:
        falling = torch.arange(1, 257).float().reciprocal()
        x = random(1024, 256, seed=seed) * falling @ random(256, 256, seed=seed + 1) * (1 + random(256, seed=9).abs())
        H = hessian_of(x)
        pivots, act, none = (
            factorize_in_order(H, order, 256, 0.01).R.diagonal().square().sum() for order in ("static", "act", "none")
        )
        assert pivots < 0.99 * act
        assert act < 0.99 * none

    def test_equal_columns_are_taken_as_they_come(self) -> None:
        factor = factorize_by_pivots(torch.eye(40), 0.01)
        assert factor.order.tolist() == list(range(40))[::-1]


class TestNearest:
    @pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
    @pytest.mark.parametrize("bits", BITS)
    def test_is_gptq_under_the_unit_hessian(self, bits: int, symmetric: bool, search: bool) -> None:
        weight, g_idx = random(16, 256), torch.arange(256, dtype=torch.int32) // 64
        how = {"bits": bits, "symmetric": symmetric, "search": search}
        nearest = round_to_nearest(weight, g_idx, **how)
        for static in (False, True):
            result = gptq(weight, unit_factor(256), group_size=64, static=static, **how)
            for name in ("codes", "scale", "zero_point", "g_idx"):
                assert torch.equal(getattr(result, name), getattr(nearest, name)), name
            assert torch.allclose(result.loss, nearest.loss, rtol=ERROR_TOLERANCE)
        assert torch.allclose(nearest.loss, row_error(weight, nearest, torch.eye(256)), rtol=ERROR_TOLERANCE)

    def test_follows_any_groups(self) -> None:
        weight, places = random(8, 128), torch.randperm(128, generator=torch.Generator().manual_seed(3))
        g_idx = (torch.arange(128) // 32)[places]
        how = {"bits": 3, "symmetric": False, "search": True}
        nearest = round_to_nearest(weight, g_idx, **how)
        sorted_ = round_to_nearest(weight[:, places.argsort()], torch.arange(128) // 32, **how)
        assert torch.allclose(nearest.dequantize(), sorted_.dequantize()[:, places], rtol=ONE_FP16_UNIT)

    @pytest.mark.parametrize("order", ORDERS)
    def test_rows_that_it_serves_better_are_its(self, order: str) -> None:
        """A column that is nearly another's copy, and weights at the end of a 2-bit grid: repairs fall outside and are lost."""
        x = correlated_inputs(512, 64)
        x[:, 32:] = x[:, :32] + 0.1 * random(512, 32, seed=5)
        weight, H = random(256, 64).sign() * (1 + 0.3 * random(256, 64, seed=1)), hessian_of(x)
        how = {"bits": 2, "symmetric": True, "search": False}
        result, factor = solve(weight, H, order, group_size=32, **how)
        kept = keep_nearest_where_better(weight, factor, result, **how)
        nearest = round_to_nearest(weight, result.g_idx, **how)
        theirs, its = (row_error(weight, r, damped(H, 0.01)) for r in (result, nearest))
        expected = its < theirs
        assert 0 < kept.nearest_rows < 256
        assert kept.nearest_rows == int(expected.sum())
        for name in ("codes", "scale", "zero_point"):
            mine = getattr(kept, name)
            assert torch.equal(mine[expected], getattr(nearest, name)[expected])
            assert torch.equal(mine[~expected], getattr(result, name)[~expected])
        assert torch.allclose(kept.loss, torch.minimum(theirs, its), rtol=ERROR_TOLERANCE)

    def test_nothing_is_touched_where_gptq_is_better(self) -> None:
        weight, H = random(32, 256), hessian_of(correlated_inputs(1024, 256))
        how = {"bits": 4, "symmetric": True, "search": True}
        result, factor = solve(weight, H, "gar", group_size=64, **how)
        assert keep_nearest_where_better(weight, factor, result, **how) is result
        assert result.nearest_rows == 0


class TestDeadColumns:
    def test_keep_their_rounding_to_nearest(self) -> None:
        weight, x = random(16, 128), correlated_inputs(512, 128)
        dead = torch.tensor([0, 5, 64, 127])
        x[:, dead] = 0
        H = hessian_of(x)
        for order in ORDERS:
            result, _ = solve(weight, H, order, bits=4, group_size=32, symmetric=True, search=True)
            group = result.g_idx[dead].long()
            scale, zero = result.scale.double()[:, group], result.zero_point.double()[:, group]
            nearest = torch.clamp(torch.round(weight.double()[:, dead] / scale) + zero, 0, 15)
            assert torch.equal(result.codes[:, dead].double(), nearest)

    def test_all_dead_but_one(self) -> None:
        x = torch.zeros(64, 128)
        x[:, 17] = 1
        factor = factorize(hessian_of(x), torch.arange(128), 0.01)
        result = gptq(random(8, 128), factor, bits=4, group_size=64, symmetric=True, search=False)
        assert math.isfinite(result.error)
        assert (dequantized(result) - random(8, 128)).abs().max() < 0.6


def rank_one(x: Tensor) -> Tensor:
    return x[:, :1] * x[:1]


def duplicated(x: Tensor) -> Tensor:
    return torch.cat([x[:, : x.shape[1] // 2]] * 2, 1)


# Kinds of input that are unusual and finite: the result must be as well.
INPUTS = {
    "rank-1": rank_one,
    "fewer-samples-than-columns": lambda x: x[:20],
    "one-sample": lambda x: x[:1],
    "duplicate-columns": duplicated,
    "all-columns-equal": lambda x: x[:, :1].expand(-1, x.shape[1]),
    "outlier-1e4": lambda x: torch.cat([x[:, :1] * 1e4, x[:, 1:]], 1),
    "one-huge-token": lambda x: torch.cat([x[:1] * 1e4, x[1:]]),
    "large": lambda x: x * 1e15,
    "small": lambda x: x * 1e-15,
    "subnormal-squares": lambda x: x * 1e-20,
    "half-dead": lambda x: x * (torch.arange(x.shape[1]) % 2),
    "constant": lambda x: torch.ones_like(x),
}
WEIGHTS = {
    "normal": lambda w: w,
    "zero": lambda w: w * 0,
    "zero-row": lambda w: torch.cat([w[:-1], w[-1:] * 0]),
    "constant-rows": lambda w: w[:, :1].expand_as(w).contiguous(),
    "size-1e-30": lambda w: w * 1e-30,
    "subnormal": lambda w: w * 1e-40,
    "fp16-subnormal": lambda w: w * 2.0**-20,
    "65504": lambda w: w.clamp(-1, 1) * 65504,
    "outlier-1e4": lambda w: torch.cat([w[:, :1] * 1e4, w[:, 1:]], 1),
}


class TestFaults:
    @pytest.mark.parametrize("inputs", INPUTS)
    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
    def test_no_silent_nan(self, inputs: str, weights: str, search: bool) -> None:
        """Each unusual input either works, with an error that is what it says, or is refused by name."""
        weight = WEIGHTS[weights](random(8, 128))
        H = hessian_of(INPUTS[inputs](correlated_inputs(256, 128)))
        for seed, (bits, symmetric, order) in enumerate(
            [(4, True, "gar"), (2, False, "act"), (3, False, "none"), (2, True, "static")]
        ):
            how = {"bits": bits, "symmetric": symmetric, "search": search}
            try:
                result, factor = solve(weight, H, order, group_size=32, **how)
                result = keep_nearest_where_better(weight, factor, result, **how)
            except SingularHessian:
                assert inputs in ("subnormal-squares",), "only a Hessian of almost nothing may be refused"
                continue
            except ValueError as error:
                # Repairs of neighbours can grow without bound where columns are copies of each other.
                if "fp16" not in str(error) or weights not in ("65504", "outlier-1e4"):
                    raise
                continue
            assert math.isfinite(result.error), seed
            assert math.isfinite(weighted_norm(weight, factor))
            assert result.scale.isfinite().all()
            assert (result.scale != 0).all()
            assert torch.equal(result.scale, result.scale.half().float())
            assert result.codes.max() <= 2**bits - 1
            assert result.zero_point.min() >= 1
            assert result.zero_point.max() <= 2**bits - 1
            # Never worse than rounding to nearest, whatever the fault; with damping by construction, without it as well.
            nearest = round_to_nearest(weight, result.g_idx, **how)
            for hessian in (damped(H, factor.damp), H):
                mine, its = row_error(weight, result, hessian), row_error(weight, nearest, hessian)
                rounding = ROUNDING * (hessian.double().diagonal().max() * (weight.double() ** 2).sum(1))
                assert (mine <= its * (1 + ERROR_TOLERANCE) + rounding).all()
            if weights == "zero":
                assert result.error == 0
                assert (dequantized(result) == 0).all()
            if weights == "zero-row":
                assert (dequantized(result)[-1] == 0).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("order", ORDERS)
    def test_non_finite_weights_are_refused(self, value: float, order: str) -> None:
        weight, H = random(4, 64), hessian_of(correlated_inputs(128, 64))
        weight[2, 63] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            solve(weight, H, order, bits=4, group_size=32, symmetric=True, search=True)
        with pytest.raises(ValueError, match="NaN or infinite"):
            round_to_nearest(weight, torch.arange(64) // 32, bits=4, symmetric=True, search=False)

    @pytest.mark.parametrize(("inputs", "group_size"), [(100, 32), (64, 128), (64, 0), (64, -1)])
    def test_ragged_groups_are_refused(self, inputs: int, group_size: int) -> None:
        with pytest.raises(ValueError, match="do not divide"):
            gptq(random(4, inputs), unit_factor(inputs), bits=4, group_size=group_size, symmetric=True, search=False)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("group_size", [1, 4])
    def test_few_columns(self, order: str, group_size: int) -> None:
        weight, H = random(5, group_size), hessian_of(random(9, group_size))
        result, factor = solve(weight, H, order, bits=3, group_size=group_size, symmetric=False, search=True)
        assert torch.allclose(result.loss, row_error(weight, result, damped(H, 0.01)), rtol=1e-3, atol=1e-9)
        assert factor.damp == 0.01

    def test_groups_smaller_than_what_one_product_brings(self) -> None:
        weight, H = random(6, 48), hessian_of(correlated_inputs(96, 48))
        result, factor = solve(weight, H, "gar", bits=4, group_size=4, symmetric=True, search=False)
        assert follow_oracle(weight, damped(H, 0.01), factor.order, 4, 4, True, result) <= 2

    @pytest.mark.parametrize("order", ORDERS)
    def test_the_same_bytes_twice(self, order: str) -> None:
        weight, H = random(32, 256), hessian_of(correlated_inputs(300, 256))
        how = {"bits": 3, "group_size": 64, "symmetric": False, "search": True}
        one, two = (solve(weight.clone(), H.clone(), order, **how)[0] for _ in range(2))
        for name in ("codes", "scale", "zero_point", "g_idx", "loss"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes_are_widened(self, dtype: torch.dtype) -> None:
        weight, H = random(8, 64).to(dtype), hessian_of(correlated_inputs(128, 64))
        how = {"bits": 4, "group_size": 32, "symmetric": True, "search": True}
        assert torch.equal(solve(weight, H, "gar", **how)[0].codes, solve(weight.float(), H, "gar", **how)[0].codes)

    def test_overflow_in_the_solver_is_refused(self) -> None:
        R = torch.eye(32)
        R[0, 1:] = 1e38
        weight = random(4, 32) * 1e3
        with pytest.raises(ValueError, match=r"too large|fp16"):
            gptq(weight, Factor(R, torch.arange(32), 0.01), bits=4, group_size=32, symmetric=True, search=False)


class TestBackend:
    """What GptqBackend makes of faults, and what it stores."""

    backend = GptqBackend()

    def settings(self, **changes: object) -> LinearSettings:
        found = settings_for(
            quantize_section({"backend": "gptq", "quality": "fast", "group_size": 32, **changes}), "layers.0.fc1"
        )
        assert found is not None
        return found

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_non_finite_weight_names_its_layer(self, value: float) -> None:
        weights = {"layers.0.q": random(32, 64), "layers.0.k": random(32, 64)}
        weights["layers.0.k"][3, 7] = value
        with pytest.raises(DataError, match=r"^layers\.0\.k\.weight: "):
            self.backend.quantize(weights, Statistics(torch.eye(64), 100), self.settings())

    @pytest.mark.parametrize("hessian", [torch.zeros(64, 64), torch.full((64, 64), float("nan"))], ids=["zero", "nan"])
    def test_unusable_hessian(self, hessian: Tensor) -> None:
        weights = {"layers.0.q": random(32, 64)}
        with pytest.raises(DataError, match=r"^layers\.0\.q: .*on_failure: round_to_nearest"):
            self.backend.quantize(weights, Statistics(hessian, 100), self.settings())
        (made,) = self.backend.quantize(weights, Statistics(hessian, 100), self.settings(on_failure="round_to_nearest"))
        assert made.facts["method"] == "round_to_nearest"
        assert "Hessian" in made.facts["why"]
        plain = gptq(weights["layers.0.q"], unit_factor(64), bits=4, group_size=32, symmetric=True, search=True)
        stored = self.backend.dequantize(made.tensors, (32, 64), GptqFormat(4, 32))
        assert torch.equal(stored.double(), dequantized(plain))

    def test_weights_too_large_for_fp16_scales(self) -> None:
        with pytest.raises(DataError, match=r"layers\.0\.q.*fp16"):
            self.backend.quantize({"layers.0.q": random(32, 64) * 1e6}, Statistics(torch.eye(64), 9), self.settings())

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
    def test_stored_tensors_are_the_solvers(self, bits: int, order: str, symmetric: bool) -> None:
        weights = {"q": random(32, 128), "k": random(64, 128, seed=1)}
        H = hessian_of(correlated_inputs(256, 128))
        made = self.backend.quantize(
            weights, Statistics(H, 256), self.settings(bits=bits, order=order, symmetric=symmetric, quality="fast")
        )
        how = {"bits": bits, "symmetric": symmetric, "search": True}
        stacked = torch.cat([*weights.values()])
        result, factor = solve(stacked, H, order, group_size=32, **how)
        result = keep_nearest_where_better(stacked, factor, result, **how)
        stored = [
            self.backend.dequantize(m.tensors, (w.shape[0], w.shape[1]), GptqFormat(bits, 32, symmetric))
            for m, w in zip(made, weights.values(), strict=True)
        ]
        # scale * (code - zero point) is one rounding in float32.
        assert torch.equal(torch.cat(stored), dequantized(result).float())
        # Each linear's own error, although they were solved together.
        for linear, (weight, part) in zip(made, zip(weights.values(), stored, strict=True), strict=True):
            lost, whole = (
                torch.einsum("oi,ij,oj->", x, damped(H, 0.01), x) for x in ((weight - part).double(), weight.double())
            )
            assert linear.facts["relative_error"] == pytest.approx((lost / whole).sqrt().item(), rel=ERROR_TOLERANCE)
        assert made[0].facts["damp"] == 0.01
