"""What the next token is drawn from, against transformers' processors; the draw itself; text writing and stop strings."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qlm.engine.options import Options
from qlm.engine.sampling import choose, generator_of, penalized, probabilities
from qlm.engine.text import TextWriter
from qlm.errors import DataError
from tests.conftest import make_tokenizer

# transformers computes in float32: its softmax and its sums carry this much of rounding.
TOLERANCE = 2e-6

# Multiples of an eighth: ties are frequent and exact, and nothing but ties is close.
LOGITS = st.lists(st.integers(-200, 200).map(lambda n: n / 8), min_size=1, max_size=60)
PROBABILITY = st.floats(0.01, 1.0)


def options(**changes: object) -> Options:
    values = dict(
        max_new_tokens=1, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, num_return_sequences=1,
        seed=None, greedy=False, stop=(),
    )  # fmt: skip
    return Options(**{**values, **changes})  # type: ignore[arg-type]


def by_transformers(
    logits: list[float], seen: list[int], penalty: float, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[np.ndarray, float]:
    """Probabilities by transformers' processors in transformers' order, and how close top_p's threshold is to a sum."""
    ids, scores = torch.tensor([seen]), torch.tensor([logits], dtype=torch.float32)
    if penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    if temperature != 1.0:
        scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    margin = 1.0
    if top_p is not None and top_p < 1.0:
        sums = scores.double().sort().values.softmax(-1).cumsum(-1)
        margin = float((sums - (1 - top_p)).abs().min())
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return scores.softmax(-1)[0].numpy(), margin


def ours(
    logits: list[float], seen: list[int], penalty: float, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    scores = penalized(np.array(logits, np.float32), np.array(seen, np.int64), penalty)
    return probabilities(scores, temperature, top_k, top_p)


@given(
    LOGITS,
    st.data(),
    st.sampled_from([1.0, 0.5, 1.25, 2.0]),
    st.sampled_from([1.0, 0.25, 0.5, 2.0, 4.0]),
    st.none() | st.integers(1, 70),
    st.none() | PROBABILITY,
)
def test_probabilities_are_those_of_transformers(
    logits: list[float],
    data: st.DataObject,
    penalty: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=8))
    # 1.25 * n / 8 and n / 8 / 1.25 can be close to each other without being equal, in one arithmetic and not in the other.
    penalized_values = ours(logits, seen, penalty, 1.0, None, None)
    gaps = np.diff(np.unique(np.log(np.maximum(penalized_values, 1e-300))))
    assume(penalty != 1.25 or not len(gaps) or gaps.min() > 1e-4)
    expected, margin = by_transformers(logits, seen, penalty, temperature, top_k, top_p)
    assume(margin > TOLERANCE)
    found = ours(logits, seen, penalty, temperature, top_k, top_p)
    assert found.dtype == np.float64
    assert (found > 0).sum() >= 1
    # float32 loses the smallest probabilities; what top_k or top_p left out is out in both.
    assert np.array_equal(found[found > 1e-30] > 0, expected[found > 1e-30] > 0)
    assert not expected[found == 0].any()
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("top_p", [1e-20, 1e-6, 0.3, 0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 50_000])
def test_equally_likely_tokens(size: int, top_p: float) -> None:
    """The higher ids stay, as in transformers where its sort is stable, which it is for small vocabularies."""
    found = ours([0.5] * size, [0], 1.0, 1.0, None, top_p)
    expected, _ = by_transformers([0.5] * size, [0], 1.0, 1.0, None, top_p)
    kept = np.flatnonzero(found)
    assert kept[-1] == size - 1
    assert np.array_equal(kept, np.arange(kept[0], size))
    if size < 100:
        assert np.array_equal(kept, np.flatnonzero(expected))
    # The rounding of float32 sums decides about one token.
    assert abs(len(kept) - np.count_nonzero(expected)) <= 1
    assert abs(found.sum() - 1) < 1e-12


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_nucleus_of_a_large_vocabulary(top_p: float) -> None:
    """Sorting all of it gives the same as sorting the likely part."""
    logits = np.random.default_rng(0).normal(0, 3, 50_000).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    order = np.argsort(-p)
    count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    found = probabilities(logits.astype(np.float64), 1.0, None, top_p)
    assert set(np.flatnonzero(found)) == set(order[:count])


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-30, 1e30, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    found = ours([1.0, 3.0, -2.0, 3.0], [0], 1.0, temperature, None, 0.99)
    assert np.isfinite(found).all()
    expected = [0, 0.5, 0, 0.5] if temperature < 1 else [0.25] * 4
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("penalty", [1e308, 1e-308])
def test_extreme_penalties(penalty: float) -> None:
    for logits in ([5.0, -5.0, 1.0], [-5.0, 5.0, 0.0], [30.0, 20.0, -30.0]):
        assert np.isfinite(ours(logits, [0, 1], penalty, 0.5, None, None)).all()


def test_greedy_and_draws() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0], np.float32)
    seen = np.array([1])
    generator = generator_of(0, 0)
    assert choose(logits, seen, options(greedy=True), generator) == 1
    assert choose(logits, seen, options(greedy=True, repetition_penalty=1.5), generator) == 3
    assert {choose(logits, seen, options(top_k=1), generator) for _ in range(100)} == {1, 3}
    assert {choose(logits, seen, options(top_p=1e-9), generator) for _ in range(20)} == {3}


def test_draws_follow_the_probabilities() -> None:
    logits = np.random.default_rng(1).normal(0, 1.5, 12).astype(np.float32)
    wanted = options(temperature=0.8, top_p=0.9)
    generator, draws = generator_of(1, 0), 20_000
    counts = np.bincount([choose(logits, np.array([0]), wanted, generator) for _ in range(draws)], minlength=12)
    p = probabilities(logits.astype(np.float64), 0.8, None, 0.9)
    assert not counts[p == 0].any()
    # Six standard deviations of a binomial count.
    assert (np.abs(counts - draws * p) <= 6 * np.sqrt(draws * p * (1 - p))).all()


def test_seeds_and_numbers_are_separate_sources() -> None:
    draws = {(seed, n): generator_of(seed, n).random() for seed in (0, 1, (1 << 64) - 1) for n in range(3)}
    assert len(set(draws.values())) == 9
    assert generator_of(1, 2).random() == draws[1, 2]
    assert generator_of(None, 0).random() != generator_of(None, 0).random()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("greedy", [True, False])
def test_not_finite(value: float, greedy: bool) -> None:
    logits = np.array([0.0, value, 1.0], np.float32)
    with pytest.raises(DataError, match="logits are NaN or infinite after 7 tokens"):
        choose(logits, np.zeros(7, np.int64), options(greedy=greedy), generator_of(0, 0))


# --- text -------------------------------------------------------------------------------------------------------------

TOKENIZER = make_tokenizer()


def write(ids: list[int], end_ids: tuple[int, ...] = (), stop: tuple[str, ...] = ()) -> tuple[str, list[str], int]:
    """(text, pieces, tokens taken before the writer knew that the text had ended)"""
    pieces: list[str] = []
    writer = TextWriter(lambda row: TOKENIZER.decode(row, skip_special_tokens=True), end_ids, stop, pieces.append)
    taken = 0
    for index in ids:
        if writer.ended:
            break
        writer.put(index)
        taken += 1
    assert writer.end() == writer.text == "".join(pieces)
    assert all(pieces)
    writer.put(5)
    assert writer.text == "".join(pieces)
    return writer.text, pieces, taken


def end_of_text(text: str, stops: tuple[str, ...]) -> str:
    """`text` before the stop string that is complete first, the longest of those; character by character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


class TestText:
    def test_waits_for_whole_characters(self) -> None:
        text, pieces, _ = write(TOKENIZER.encode("猫€ é👍🏽").ids)
        assert text == "猫€ é👍🏽"
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert len(pieces) >= 5

    @given(st.lists(st.integers(0, 319), max_size=40))
    def test_joined_is_the_decoded_whole(self, ids: list[int]) -> None:
        assert write(ids)[0] == TOKENIZER.decode(ids, skip_special_tokens=True)

    def test_end_ids(self) -> None:
        ids = TOKENIZER.encode("one two three").ids
        assert write(ids, end_ids=(ids[4], 999))[0] == TOKENIZER.decode(ids[:4])
        assert write(ids, end_ids=(ids[4], 999))[2] == 5

    @given(
        st.text("ab猫\n ", max_size=40), st.lists(st.text("ab猫\n ", min_size=1, max_size=5), min_size=1, max_size=3)
    )
    def test_stop_strings(self, text: str, stops: list[str]) -> None:
        """However they lie over the tokens, and at the first token that completes one."""
        expected = end_of_text(text, tuple(stops))
        by_character = [i for character in text for i in TOKENIZER.encode(character).ids]
        for ids in (TOKENIZER.encode(text).ids, by_character):
            found, pieces, taken = write(ids, stop=tuple(stops))
            assert found == expected
            for n in range(1, len(pieces)):
                assert expected.startswith("".join(pieces[:n]))
            if expected != text:
                before = TOKENIZER.decode(ids[: taken - 1]).rstrip("\N{REPLACEMENT CHARACTER}")
                assert end_of_text(before, tuple(stops)) == before

    def test_a_possible_beginning_is_held_back(self) -> None:
        pieces: list[str] = []
        writer = TextWriter(lambda row: TOKENIZER.decode(row), (), ("END",), pieces.append)
        for character in "xEEN":
            writer.put(TOKENIZER.encode(character).ids[0])
        assert pieces == ["x", "E"]
        writer.put(TOKENIZER.encode("!").ids[0])
        assert pieces == ["x", "E", "EN!"]
        for character in "EN":
            writer.put(TOKENIZER.encode(character).ids[0])
        assert writer.end() == "xEEN!EN"

    def test_decoders_that_treat_a_beginning_differently(self) -> None:
        """SentencePiece's decoder drops the first space of a text, and of nothing else."""
        words = ["▁the", "▁cat", "s", "▁sat"]

        def decode(ids: list[int]) -> str:
            return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

        writer = TextWriter(decode, ())
        for index in (0, 1, 2, 3, 0):
            writer.put(index)
        assert writer.end() == "the cats sat the"
