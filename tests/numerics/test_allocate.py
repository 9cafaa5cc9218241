"""The choice under a budget: as good as trying everything, the same one every time, and fast at the size of a large model."""

import itertools
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm.numerics.allocate import allocate

# Far above what it takes (well below a second); a search that looks at everything would never end.
MANY_SECONDS = 15.0
# Share of a budget that a good choice among thousands of sizes leaves no room to miss.
LEAST_USED = 0.9999
# Sums of a few hundred float64 numbers in two orders.
SUMS = 1e-9

Instance = tuple[list[list[float]], list[list[int]], int]


def everything(costs: list[list[float]], sizes: list[list[int]], budget: int) -> list[int] | None:
    """Try every choice: least cost, then least size, then lexicographically first."""
    found = []
    for choice in itertools.product(*(range(len(cost)) for cost in costs)):
        size = sum(size[option] for size, option in zip(sizes, choice, strict=True))
        if size <= budget:
            cost = sum(cost[option] for cost, option in zip(costs, choice, strict=True))
            found.append((cost, size, choice))
    return list(min(found)[2]) if found else None


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """Few layers, whole costs (so that sums are exact and ties occur), budgets from too small to more than enough."""
    options = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    costs = [draw(st.lists(st.integers(-3, 12), min_size=n, max_size=n)) for n in options]
    sizes = [draw(st.lists(st.integers(0, 15), min_size=n, max_size=n)) for n in options]
    budget = draw(st.integers(0, sum(map(max, sizes)) + 2))
    return [[float(c) for c in cost] for cost in costs], sizes, budget


@settings(max_examples=600, deadline=None)
@given(instances())
def test_is_what_trying_everything_finds(instance: Instance) -> None:
    best = everything(*instance)
    if best is None:
        with pytest.raises(ValueError, match="over the budget"):
            allocate(*instance)
    else:
        assert allocate(*instance) == best


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_with_costs_that_fall_like_errors_do(seed: int) -> None:
    """Costs over many orders of magnitude, sizes of a linear's bytes; floats, so that ties do not occur."""
    draw = random.Random(seed)
    scale = 10.0 ** draw.randint(-12, 6)
    costs, sizes = [], []
    for _ in range(draw.randint(1, 6)):
        kappa, weights = scale * 10 ** draw.uniform(-4, 0), 256 * draw.randint(1, 16) * 256
        costs.append([kappa * 4.0**-bits * draw.uniform(0.8, 1.2) for bits in (2, 3, 4, 8)])
        sizes.append([weights * bits // 8 + weights // 64 for bits in (2, 3, 4, 8)])
    budget = draw.randint(sum(map(min, sizes)), sum(map(max, sizes)))
    assert allocate(costs, sizes, budget) == everything(costs, sizes, budget)


def plain_dynamic_programming(costs: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    """The textbook's table: least cost for every capacity from 0 to the budget."""
    table = np.zeros(budget + 1)
    for cost, size in zip(costs, sizes, strict=True):
        new = np.full(budget + 1, np.inf)
        for c, s in zip(cost, size, strict=True):
            new[s:] = np.minimum(new[s:], table[: budget + 1 - s] + c)
        table = new
    return float(table[budget])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_many_layers_against_the_textbook(share: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = np.sort(draw.integers(1, 60, (40, 6)), axis=1)
    costs = 4.0 ** -(sizes / 10) * draw.lognormal(0, 1, (40, 1)) * draw.uniform(0.9, 1.1, sizes.shape)
    low, high = int(sizes.min(1).sum()), int(sizes.max(1).sum())
    budget = int(low + share * (high - low))
    choice = allocate(costs.tolist(), sizes.tolist(), budget)
    taken = np.arange(40), np.array(choice)
    assert sizes[taken].sum() <= budget
    assert costs[taken].sum() == pytest.approx(plain_dynamic_programming(costs, sizes, budget), rel=SUMS)


def large_model() -> Instance:
    """300 linears, 8 options each, with the sizes of a GPTQ file."""
    draw = np.random.default_rng(0)
    costs, sizes = [], []
    for _ in range(300):
        outputs, inputs = draw.choice([768, 2048, 2304, 4096, 8192]), draw.choice([768, 2048, 4096])
        kappa = float(draw.lognormal(0, 2))
        cost, size = [], []
        for bits, group in itertools.product((2, 3, 4, 8), (32, 128)):
            cost.append(kappa * 4.0**-bits * (0.8 if group == 32 else 1.0) * float(draw.uniform(0.9, 1.1)))
            size.append(int(inputs * outputs * bits // 8 + inputs // group * outputs * (2 + bits / 8) + 4 * inputs))
        costs.append(cost)
        sizes.append(size)
    total = sum(max(size) for size in sizes)
    return costs, sizes, int(0.45 * total)


def test_a_large_model_takes_no_time() -> None:
    costs, sizes, budget = large_model()
    started = time.perf_counter()
    choice = allocate(costs, sizes, budget)
    assert time.perf_counter() - started < MANY_SECONDS
    size = sum(s[o] for s, o in zip(sizes, choice, strict=True))
    assert LEAST_USED * budget < size <= budget
    assert choice == allocate(costs, sizes, budget)
    # No change of one layer, and none of two, is cheaper and fits: a check that needs no second solver.
    C, S = np.array(costs), np.array(sizes)
    dc = C - C[np.arange(300), choice][:, None]
    ds = S - S[np.arange(300), choice][:, None]
    assert dc[ds <= budget - size].min() >= 0
    for layer in range(300):
        for option in range(8):
            both = dc[layer, option] + dc
            both[(ds[layer, option] + ds > budget - size)] = np.inf
            both[layer] = np.inf
            assert both.min() >= -SUMS


def test_ties_take_the_smaller_and_then_the_earlier_option() -> None:
    assert allocate([[1.0, 1.0]], [[5, 4]], 10) == [1]
    assert allocate([[1.0, 1.0, 1.0]], [[5, 5, 5]], 10) == [0]
    # Either layer could take the expensive option; the first keeps its lower one.
    assert allocate([[1.0, 0.0], [1.0, 0.0]], [[1, 2], [1, 2]], 3) == [0, 1]


def test_a_budget_for_everything_takes_the_best_of_each() -> None:
    assert allocate([[3.0, 1.0, 2.0], [0.5], [7.0, 9.0]], [[1, 9, 2], [3], [4, 1]], 10**12) == [1, 0, 0]


def test_no_layers() -> None:
    assert allocate([], [], 0) == []


@pytest.mark.parametrize(
    ("costs", "sizes", "budget", "message"),
    [
        ([[1.0]], [[5], [6]], 9, "costs of 1 layers, but sizes of 2"),
        ([[1.0, 2.0]], [[5]], 9, "layer 0 has 2 costs and 1 sizes"),
        ([[1.0], []], [[5], []], 9, "layer 1 has 0 costs"),
        ([[float("nan")]], [[5]], 9, "layer 0 has a cost that is NaN or infinite"),
        ([[1.0]], [[-5]], 9, "layer 0 has sizes"),
        ([[1.0]], [[0.5]], 9, "layer 0 has sizes"),
        ([[1.0, 2.0], [1.0]], [[5, 4], [6]], 9, "the smallest choice takes 10, which is over the budget of 9"),
    ],
)
def test_refuses(costs: list[list[float]], sizes: list[list[int]], budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(costs, sizes, budget)
