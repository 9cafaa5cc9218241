"""The next token from logits, in numpy: transformers' logits processors in their order, then one draw.

Order and meaning are those of transformers' `_get_logits_processor` and `generation/logits_process.py`: repetition penalty,
temperature, top_k, top_p, softmax. Numbers are float64 where transformers has float32, so that only a probability within
rounding of top_p's threshold can be treated differently. top_k keeps all tokens that are as likely as the k-th; of equally
likely tokens at top_p's threshold those with the higher ids stay (in transformers those that its sort, which is stable for small
vocabularies only, puts last).

Shapes: V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray

from qlm.engine.options import Options
from qlm.errors import DataError

Floats = NDArray[np.float64]

# Far beyond any logit, and far enough from infinity that differences stay finite.
_LARGEST = 1e300


def generator_of(seed: int | None, number: int) -> np.random.Generator:
    """The source of randomness of the `number`-th continuation of a prompt; None: one that nobody can repeat.

    It depends on nothing else, so that a text does not change with the other prompts of a call.
    """
    if seed is None:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence()))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(number,))))


def penalized(logits: NDArray[np.float32], seen: NDArray[np.int64], penalty: float) -> Floats:
    """Logits [V] as float64, those of the tokens `seen` made less likely (CTRL, arXiv:1909.05858, section 4.1).

    Raises DataError for logits that are NaN or infinite.
    """
    if not bool(np.isfinite(logits).all()):
        raise DataError(
            f"logits are NaN or infinite after {len(seen)} tokens: the checkpoint is damaged, or its values are too large for "
            "the cache's dtype (float32 holds all)"
        )
    scores: Floats = logits.astype(np.float64)
    if penalty != 1.0:
        of_seen = scores[seen]
        with np.errstate(over="ignore"):
            changed = np.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
        scores[seen] = np.clip(changed, -_LARGEST, _LARGEST)
    return scores


def probabilities(scores: Floats, temperature: float, top_k: int | None, top_p: float | None) -> Floats:
    """What the next token is drawn from: float64 [V], sums to 1, 0 for tokens that top_k or top_p leave out."""
    # The maximum goes first: a tiny temperature then gives 0 for the others, not infinity for all.
    with np.errstate(over="ignore"):
        scaled = (scores - scores.max()) / temperature
    weights: Floats = np.exp(scaled)
    if top_k is not None and top_k < len(scores):
        weights[scores < np.partition(scores, len(scores) - top_k)[len(scores) - top_k]] = 0.0
    weights /= weights.sum()
    if top_p is not None and top_p < 1.0:
        weights[_outside_nucleus(weights, top_p)] = 0.0
        weights /= weights.sum()
    return weights


def _outside_nucleus(p: Floats, top_p: float) -> NDArray[np.int64]:
    """The tokens to leave out: the least likely ones, as many as have no more than 1 - top_p in all; never the most likely."""
    # All tokens at or below (1 - top_p) / V have no more than 1 - top_p in all: only the others need to be sorted.
    unlikely = p <= (1.0 - top_p) / len(p)
    unlikely[len(p) - 1 - int(p[::-1].argmax())] = False
    likely = np.flatnonzero(~unlikely)
    order = likely[np.argsort(p[likely], kind="stable")]
    from_the_least = p[unlikely].sum() + np.cumsum(p[order])
    cut = min(int(np.searchsorted(from_the_least, 1.0 - top_p, side="right")), len(order) - 1)
    return np.concatenate([np.flatnonzero(unlikely), order[:cut]])


def choose(
    logits: NDArray[np.float32], seen: NDArray[np.int64], options: Options, generator: np.random.Generator
) -> int:
    """The next token's id, from the logits [V] after the tokens `seen`.

    Raises DataError for logits that are NaN or infinite.
    """
    scores = penalized(logits, seen, options.repetition_penalty)
    if options.greedy:
        return int(scores.argmax())
    p = probabilities(scores, options.temperature, options.top_k, options.top_p)
    sums = np.cumsum(p)
    # side="right" never lands on a token of probability 0; the last sum may be a rounding error away from 1.
    return int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))
