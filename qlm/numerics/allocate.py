"""Mixed precision under a budget: which option each layer takes so that the total cost is least and the total size fits.

The multiple-choice knapsack problem, solved exactly: dynamic programming over the undominated pairs (size, cost) of the layers
seen so far, where a pair is dropped as soon as a Lagrangian bound shows that nothing better than a known solution can come of it
(Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995). Sizes are taken as they are, to the byte;
nothing is rounded. Integers and floats in, choices out: what a layer, an option or a cost is, callers know.
"""

from collections.abc import Sequence

import numpy as np

# Sums of float64 costs in different orders differ by less than this, relative to their size: the bound must not drop the best.
ROUNDING = 1e-9
# Halvings of the interval in which the price of a byte lies: more than float64 has digits.
HALVINGS = 100


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Choose one option a layer: the least total cost among the choices whose total size is at most `budget`.

    Among equal costs (as float64 sums, from the last layer to the first) the smaller size wins, and among equal sizes the choice
    that is lexicographically first, so that the result depends on nothing but the arguments.

    Args:
        costs: of each option of each layer; finite, any sign. Layers may have different numbers of options.
        sizes: likewise, whole numbers of 0 and more, in the budget's unit.
    Returns:
        the index of the chosen option of each layer.
    Raises:
        ValueError: the arguments do not fit each other, a cost is not finite, or even the smallest choice is over the budget.
    """
    _check(costs, sizes)
    if not costs:
        return []
    # One row a layer; a layer of fewer options is filled up with options that are never taken.
    widest = max(map(len, costs))
    C = np.full((len(costs), widest), np.inf)
    S = np.zeros((len(costs), widest), np.int64)
    for layer, (of_options, bytes_of_options) in enumerate(zip(costs, sizes, strict=True)):
        C[layer, : len(of_options)], S[layer, : len(of_options)] = of_options, bytes_of_options
    smallest = np.array([min(size) for size in sizes], np.int64)
    if smallest.sum() > budget:
        raise ValueError(f"the smallest choice takes {smallest.sum()}, which is over the budget of {budget}")

    price, known = _relaxation(C, S, budget)
    # What a layer costs beyond the cheapest way to serve it at this price of a unit of size, whatever the others do. A choice's
    # cost is at least the bound plus the sum of these, so that choices whose sum exceeds the gap need not be looked at.
    priced = C + price * S
    beyond = priced - priced.min(1, keepdims=True)
    bound = priced.min(1).sum() - price * budget
    gap = known - bound + ROUNDING * (np.abs(priced.min(1)).sum() + price * budget + abs(known))
    # Room that the layers before this one need at least.
    before = np.concatenate([[0], np.cumsum(smallest)[:-1]])

    # From the last layer to the first, so that among equal pairs the lower option of the earlier layer can win.
    size, cost, over = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for layer in reversed(range(len(C))):
        size = (size + S[layer][:, None]).ravel()
        cost = (cost + C[layer][:, None]).ravel()
        over = (over + beyond[layer][:, None]).ravel()
        # Room that is left unused is paid for, too, but only the last step knows how much that is.
        kept = np.flatnonzero((size <= budget - before[layer]) & (over <= gap))
        # lexsort is stable: equal pairs stay in the order of their options.
        kept = kept[np.lexsort((cost[kept], size[kept]))]
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], cost[kept][:-1]]))
        kept = kept[cost[kept] < best_before]
        steps.append((kept // (len(size) // widest), kept % (len(size) // widest)))
        size, cost, over = size[kept], cost[kept], over[kept]

    place = int(np.argmin(cost))
    choice = []
    for option, parent in reversed(steps):
        choice.append(int(option[place]))
        place = int(parent[place])
    return choice


def _check(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> None:
    if len(costs) != len(sizes):
        raise ValueError(f"costs of {len(costs)} layers, but sizes of {len(sizes)}")
    for layer, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        if not len(cost) or len(cost) != len(size):
            raise ValueError(
                f"layer {layer} has {len(cost)} costs and {len(size)} sizes; expected as many, and one at least"
            )
        if not np.isfinite(np.asarray(cost, np.float64)).all():
            raise ValueError(f"layer {layer} has a cost that is NaN or infinite")
        whole = np.asarray(size)
        if not np.issubdtype(whole.dtype, np.integer) or (whole < 0).any():
            raise ValueError(f"layer {layer} has sizes {list(size)}; expected whole numbers of 0 and more")


def _relaxation(C: np.ndarray, S: np.ndarray, budget: int) -> tuple[float, float]:
    """The price of a unit of size at which the layers' own choices just fit, and the cost of a choice that fits. C, S [layers, options]."""
    rows = np.arange(len(C))

    def chosen(price: float) -> np.ndarray:
        # Of equally good options the smallest, so that a high enough price always fits.
        priced = C + price * S
        return np.where(priced == priced.min(1, keepdims=True), S, np.iinfo(np.int64).max).argmin(1)

    def fits(choice: np.ndarray) -> bool:
        return bool(S[rows, choice].sum() <= budget)

    if fits(chosen(0.0)):
        return 0.0, float(C[rows, chosen(0.0)].sum())
    finite = np.where(np.isfinite(C), C, 0.0)
    # At this price one unit of size outweighs any difference of costs in a layer.
    low, high = 0.0, float(np.ptp(finite, axis=1).max()) + 1.0
    while not fits(chosen(high)):
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(chosen(middle)) else (middle, high)
    choice = chosen(high)
    # Spend what is left: again and again the change of one layer that saves most and still fits.
    while True:
        room = budget - S[rows, choice].sum()
        saved = C[rows, choice][:, None] - C
        saved[(S[rows, choice] + room)[:, None] < S] = 0.0
        layer, option = np.unravel_index(int(saved.argmax()), saved.shape)
        if saved[layer, option] <= 0:
            return high, float(C[rows, choice].sum())
        choice[layer] = option
