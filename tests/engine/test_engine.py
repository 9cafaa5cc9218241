"""The engine over a fake decoder: batches, forks, prompt caching, scores, stop strings, limits; then over the native one."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import qlm
from qlm.engine.engine import CHUNK, SHARED_AT_LEAST, _plan
from qlm.errors import DataError, UsageError
from qlm.kernels import cpu
from tests.conftest import ROOT
from tests.conftest import make_tokenizer as train
from tests.engine.fake import (
    POSITIONS,
    VOCABULARY,
    FakeCache,
    FakeDecoder,
    fake_engine,
    greedy_ids,
    log_probabilities,
)

TOKENIZER: Tokenizer = train()
PROMPT = "The cat sat on the mat and looked at the dog"
PROMPTS = ["The cat", PROMPT, "a", "Some more words, and then some", "The cat sat on"]
Made = tuple[qlm.Engine, FakeDecoder]


@pytest.fixture
def made() -> Made:
    return fake_engine(TOKENIZER)


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


class TestGenerate:
    def test_greedy(self, made: Made) -> None:
        engine, decoder = made
        ids = engine.encode(PROMPT)
        assert engine.generate(PROMPT, max_new_tokens=20, greedy=True) == [text_of(greedy_ids(ids, 20))]
        # One step for the prompt, and one for each token but the last, which nothing follows.
        assert decoder.calls == [[len(ids)]] + [[1]] * 19
        assert engine.last is not None
        assert (engine.last.prompt_tokens, engine.last.computed_tokens, engine.last.reused_tokens) == (
            len(ids),
        ) * 2 + (0,)
        assert (engine.last.new_tokens, engine.last.steps) == (20, 20)
        assert engine.last.prefill_seconds > 0
        assert engine.last.decode_seconds > 0

    @pytest.mark.parametrize(
        "options", [{"greedy": True}, {"seed": 3}, {"seed": 3, "num_return_sequences": 3, "top_p": 0.9}], ids=str
    )
    def test_a_batch_gives_what_its_prompts_give_alone(self, options: dict[str, Any]) -> None:
        engine, decoder = fake_engine(TOKENIZER)
        together = engine.generate(PROMPTS, max_new_tokens=12, **options)
        sequences = len(PROMPTS) * options.get("num_return_sequences", 1)
        assert decoder.calls[1:] == [[1] * sequences] * 11
        alone = [fake_engine(TOKENIZER)[0].generate(prompt, max_new_tokens=12, **options) for prompt in PROMPTS]
        assert together == alone
        assert engine.generate(PROMPTS[::-1], max_new_tokens=12, **options) == alone[::-1]

    def test_finished_sequences_leave_the_batch(self) -> None:
        engine, decoder = fake_engine(TOKENIZER, eos_token_id=list(range(4, 60)))
        texts = engine.generate(PROMPTS, max_new_tokens=40, seed=0)
        sizes = [len(call) for call in decoder.calls[1:]]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) > 2
        assert len({len(text) for (text,) in texts}) > 1
        for prompt, text in zip(PROMPTS, texts, strict=True):
            assert (
                fake_engine(TOKENIZER, eos_token_id=list(range(4, 60)))[0].generate(prompt, max_new_tokens=40, seed=0)
                == text
            )

    def test_return_sequences_fork_the_prompt(self, made: Made) -> None:
        engine, decoder = made
        texts = engine.generate(PROMPT, max_new_tokens=8, num_return_sequences=5, seed=1)
        assert len(set(texts)) == 5
        assert decoder.calls == [[len(engine.encode(PROMPT))]] + [[1] * 5] * 7
        assert texts[:2] == engine.generate(PROMPT, max_new_tokens=8, num_return_sequences=2, seed=1)
        assert texts != engine.generate(PROMPT, max_new_tokens=8, num_return_sequences=5, seed=2)

    def test_without_a_seed_texts_differ(self, made: Made) -> None:
        # Two of them may be alike by chance; all of them would not.
        assert len({made[0].generate(PROMPT, max_new_tokens=12)[0] for _ in range(8)}) > 1

    def test_repetition_penalty_counts_prompt_and_text(self, made: Made) -> None:
        ids = made[0].encode(PROMPT)
        text = made[0].generate(PROMPT, max_new_tokens=30, greedy=True, repetition_penalty=1e9)[0]
        drawn: list[int] = []
        cache = FakeCache([], [])
        for index in ids:
            logits = cache.append(index)
        for _ in range(30):
            allowed = np.setdiff1d(np.arange(VOCABULARY), [*ids, *drawn])
            drawn.append(int(allowed[logits[allowed].argmax()]))
            logits = cache.append(drawn[-1])
        assert text == text_of(drawn)

    def test_long_prompts_go_in_chunks(self, made: Made) -> None:
        engine, decoder = made
        long = "x9 " * 600
        ids = engine.encode(long)
        assert len(ids) == 1800
        expected = text_of(greedy_ids(ids, 3))
        assert engine.generate(long, max_new_tokens=3, greedy=True) == [expected]
        assert decoder.calls == [[CHUNK], [CHUNK], [CHUNK], [1800 - 3 * CHUNK], [1], [1]]
        assert decoder.wanted == [False, False, False, True, True, True]
        engine.forget()
        decoder.calls.clear()
        found = engine.generate([long, "a", long[1:]], max_new_tokens=3, greedy=True)
        assert found[0] == [expected]
        assert found[1:] == [[text_of(greedy_ids(engine.encode(text), 3))] for text in ("a", long[1:])]
        assert [sum(call) for call in decoder.calls] == [CHUNK] * 7 + [1800 + 1 + 1799 - 7 * CHUNK, 3, 3]

    def test_no_prompts_and_twice_the_same(self, made: Made) -> None:
        engine, decoder = made
        assert engine.generate([], max_new_tokens=3) == []
        texts = engine.generate([PROMPT, PROMPT], max_new_tokens=3, seed=0)
        assert texts[0] == texts[1]
        assert decoder.calls[0] == [len(engine.encode(PROMPT))]

    def test_opt_has_its_bos_once(self) -> None:
        engine, decoder = fake_engine(TOKENIZER, "opt")
        assert engine.encode("a")[0] == 2
        assert engine.generate("", max_new_tokens=4, greedy=True) == [text_of(greedy_ids([2], 4))]
        assert decoder.calls[0] == [1]

    def test_prompts_need_a_token(self, made: Made) -> None:
        with pytest.raises(UsageError, match="the prompt is empty: a gpt_neox model"):
            made[0].generate(["a", ""], max_new_tokens=4)


class TestEnd:
    def test_eos_of_the_config(self, made: Made) -> None:
        ids = greedy_ids(made[0].encode(PROMPT), 20)
        at = next(i for i in range(2, 20) if ids[i] not in ids[:i])
        for configured in (ids[at], [ids[at]], [319, ids[at]]):
            engine, decoder = fake_engine(TOKENIZER, eos_token_id=configured)
            assert engine.generate(PROMPT, max_new_tokens=20, greedy=True) == [text_of(ids[:at])]
            assert len(decoder.calls) == at + 1
            assert engine.last is not None
            assert engine.last.new_tokens == at + 1

    def test_stop_strings(self, made: Made) -> None:
        engine, decoder = made
        whole = engine.generate(PROMPT, max_new_tokens=40, greedy=True)[0]
        for begin, length in ((5, 1), (9, 4), (0, 3), (20, 7)):
            stop = whole[begin : begin + length]
            decoder.calls.clear()
            pieces: list[str] = []
            (found,) = engine.generate(
                PROMPT, max_new_tokens=40, greedy=True, stop=["no such text", stop], stream=pieces.append
            )
            assert found == whole[: whole.index(stop)] == "".join(pieces)
            assert all(pieces)
            assert len(decoder.calls) < 40

    def test_one_sequence_of_a_batch_stops(self, made: Made) -> None:
        whole = made[0].generate(PROMPTS, max_new_tokens=20, greedy=True)
        stop = whole[1][0][6:9]
        cut = made[0].generate(PROMPTS, max_new_tokens=20, greedy=True, stop=[stop])
        assert cut == [[text.partition(stop)[0]] for (text,) in whole]
        assert cut != whole

    @pytest.mark.parametrize("seed", range(5))
    def test_stream_joined_is_the_text(self, made: Made, seed: int) -> None:
        pieces: list[str] = []
        (text,) = made[0].generate(PROMPT, max_new_tokens=40, seed=seed, stream=pieces.append)
        assert "".join(pieces) == text
        assert len(pieces) > 5


class TestPromptCache:
    def test_a_longer_prompt_continues(self, made: Made) -> None:
        engine, decoder = made
        start = len(engine.encode(PROMPT))
        for seed in range(100):
            # Random tokens often are no text, or another tokenization of it; some begin with a few that are.
            prompt = PROMPT + engine.generate(PROMPT, max_new_tokens=10, seed=seed)[0] + " and so on"
            ids, before = engine.encode(prompt), engine._kept[0][0].tolist()
            assert len(before) == start + 9
            same = next(i for i, (a, b) in enumerate(zip([*before, -1], ids, strict=False)) if a != b)
            if same > start + 2:
                break
        assert same > start + 2
        decoder.calls.clear()
        assert engine.generate(prompt, max_new_tokens=5, greedy=True) == [text_of(greedy_ids(ids, 5))]
        assert decoder.calls[0] == [len(ids) - same]
        assert engine.last is not None
        assert (engine.last.reused_tokens, engine.last.computed_tokens) == (same, len(ids) - same)

    def test_the_same_prompt_computes_its_last_token(self, made: Made) -> None:
        engine, decoder = made
        first = engine.generate(PROMPT, max_new_tokens=10, greedy=True)
        decoder.calls.clear()
        assert engine.generate(PROMPT, max_new_tokens=10, greedy=True) == first
        assert decoder.calls[0] == [1]

    def test_a_shorter_and_a_changed_prompt(self, made: Made) -> None:
        engine, decoder = made
        engine.generate(PROMPT, max_new_tokens=10, greedy=True)
        for prompt, common in ((PROMPT[:20], None), (PROMPT[:20] + "!!", None), ("zzz", 0)):
            ids, before = engine.encode(prompt), engine._kept[0][0].tolist()
            same = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(ids))
            assert common in (None, same)
            decoder.calls.clear()
            (text,) = engine.generate(prompt, max_new_tokens=5, greedy=True)
            assert text == text_of(greedy_ids(ids, 5))
            assert decoder.calls[0] == [len(ids) - min(same, len(ids) - 1)]

    def test_any_sequence_of_the_last_call_serves(self, made: Made) -> None:
        engine, decoder = made
        texts = engine.generate(PROMPT, max_new_tokens=6, num_return_sequences=4, seed=0)
        prompts = [PROMPT + text for text in texts if "\N{REPLACEMENT CHARACTER}" not in text] or [PROMPT]
        expected = [fake_engine(TOKENIZER)[0].generate(prompt, max_new_tokens=5, greedy=True) for prompt in prompts]
        decoder.calls.clear()
        assert engine.generate(prompts, max_new_tokens=5, greedy=True) == expected
        assert engine.last is not None
        assert engine.last.computed_tokens < engine.last.prompt_tokens / 2
        assert engine.last.reused_tokens == engine.last.prompt_tokens - engine.last.computed_tokens

    def test_a_common_beginning_is_computed_once(self, made: Made) -> None:
        engine, decoder = made
        common = "Once upon a time there was 7 dogs; " * 3
        prompts = [common + end for end in ("and", "but then, however", "or", "or not at all")]
        ids = [engine.encode(prompt) for prompt in prompts]
        expected = [[text_of(greedy_ids(row, 4))] for row in ids]
        assert engine.generate(prompts, max_new_tokens=4, greedy=True) == expected
        assert len(decoder.calls[0]) == 1
        assert decoder.calls[0][0] > 2 * SHARED_AT_LEAST
        assert len(decoder.calls[1]) == 4
        assert engine.last is not None
        assert engine.last.computed_tokens == sum(map(sum, decoder.calls[:2])) < sum(map(len, ids)) / 2
        # Short common beginnings are not worth a step.
        engine.forget()
        decoder.calls.clear()
        engine.generate(["The cat", "The dog"], max_new_tokens=2, greedy=True)
        assert len(decoder.calls[0]) == 2

    def test_a_prompt_that_begins_another(self, made: Made) -> None:
        engine, _ = made
        prompts = [PROMPT * 3, PROMPT, PROMPT * 2]
        expected = [[text_of(greedy_ids(engine.encode(prompt), 4))] for prompt in prompts]
        assert engine.generate(prompts, max_new_tokens=4, greedy=True) == expected
        assert engine.last is not None
        assert engine.last.computed_tokens < 1.2 * len(engine.encode(PROMPT * 3))

    def test_forget(self, made: Made) -> None:
        engine, decoder = made
        engine.generate(PROMPT, max_new_tokens=3, greedy=True)
        alive = FakeCache.alive
        engine.forget()
        assert FakeCache.alive < alive
        decoder.calls.clear()
        engine.generate(PROMPT, max_new_tokens=3, greedy=True)
        assert decoder.calls[0] == [len(engine.encode(PROMPT))]

    def test_nothing_is_kept_of_the_call_before_the_last(self, made: Made) -> None:
        engine, _ = made
        gc.collect()  # what other tests left
        before = FakeCache.alive
        for prompt in PROMPTS:
            engine.generate(prompt, max_new_tokens=3, seed=0)
            assert FakeCache.alive == before + 1

    def test_nothing_is_kept_of_a_failed_call(self, made: Made) -> None:
        engine, decoder = made
        engine.generate(PROMPT, max_new_tokens=3, greedy=True)
        decoder.spoil = True
        with pytest.raises(DataError):
            engine.generate(PROMPT, max_new_tokens=3, greedy=True)
        decoder.spoil = False
        decoder.calls.clear()
        assert engine.generate(PROMPT, max_new_tokens=3, greedy=True) == [text_of(greedy_ids(engine.encode(PROMPT), 3))]
        assert decoder.calls[0] == [len(engine.encode(PROMPT))]

    @pytest.mark.parametrize("seed", range(20))
    def test_plan_covers_every_prompt_once(self, seed: int) -> None:
        """Following a prompt through the forest gives the prompt, and no two children of a node could share more."""
        random = np.random.default_rng(seed)
        rows = {tuple(random.integers(0, 2, random.integers(1, 60)) // random.integers(1, 3)) for _ in range(30)}
        prompts = [np.array(row, np.int32) for row in sorted(rows, key=lambda row: hash((row, seed)))]
        ends: list[tuple[int, ...]] = []

        def walk(nodes: list[Any], above: tuple[int, ...]) -> None:
            for node in nodes:
                ids = tuple(node.ids.tolist())
                assert node.start == len(above) < len(ids)
                assert ids[: node.start] == above
                assert node.ends_prompt or len(node.next) > 1
                ends.extend([ids] if node.ends_prompt else [])
                walk(node.next, ids)
            for i, a in enumerate(nodes):
                for b in nodes[:i]:
                    alike = next(
                        (k for k, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y),
                        min(len(a.ids), len(b.ids)),
                    )
                    assert alike - len(above) < SHARED_AT_LEAST

        walk(_plan(prompts), ())
        assert sorted(ends) == sorted(rows)


class TestScore:
    def test_one(self, made: Made) -> None:
        ids = made[0].encode(PROMPT)
        found = made[0].score(ids)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, log_probabilities(ids), rtol=1e-5)
        assert made[0].score(np.array(ids)).tolist() == found.tolist()
        assert made[0].score([5]).shape == (0,)

    def test_several_in_chunks(self, made: Made) -> None:
        engine, decoder = made
        random = np.random.default_rng(0)
        rows = [random.integers(0, VOCABULARY, n).tolist() for n in (7, 700, 1, 1300, 2, 40)]
        before = FakeCache.alive
        for found, row in zip(engine.score(rows), rows, strict=True):
            np.testing.assert_allclose(found, log_probabilities(row), rtol=1e-4, atol=1e-5)
        total = sum(len(row) - 1 for row in rows)
        assert [sum(call) for call in decoder.calls] == [CHUNK] * (total // CHUNK) + [total % CHUNK]
        assert FakeCache.alive == before
        assert engine.score([]) == []

    @pytest.mark.parametrize(
        ("ids", "words"),
        [
            ([0, VOCABULARY], "found 320; the model has the ids 0 to 319"), ([-1, 3], "found -1"), ([[1], []], "at least one"),
            ([0.5, 1.0], "float64"), ("ab", "expected at least one token id"), ([0] * (POSITIONS + 1), "2049 tokens; the model has 2048"),
        ],
    )  # fmt: skip
    def test_wrong_ids(self, ids: Any, words: str, made: Made) -> None:
        with pytest.raises(UsageError, match=words):
            made[0].score(ids)
        assert made[1].calls == []


class TestLimits:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens 0: .* at least 1"), ({"temperature": 0.0}, "temperature 0.0: .* greedy"),
            ({"top_k": 0}, "top_k 0"), ({"top_p": 1.5}, "top_p 1.5"), ({"repetition_penalty": 0}, "repetition_penalty 0"),
            ({"seed": -1}, "seed -1"), ({"greedy": True, "top_k": 3}, "greedy: top_k would have no effect"),
            ({"num_return_sequences": 2, "stream": print}, "one sequence can be streamed, and 2"),
            ({"stop": "ab"}, "stop 'ab': expected a list"), ({"stop": [""]}, "at least one character"),
        ],
        ids=str,
    )  # fmt: skip
    def test_invalid_options(self, options: dict[str, Any], words: str, made: Made) -> None:
        with pytest.raises(UsageError, match=words):
            made[0].generate(PROMPT, **options)

    def test_prompts(self, made: Made) -> None:
        with pytest.raises(UsageError, match="expected a text, or a list of texts"):
            made[0].generate(["a", 3])  # type: ignore[list-item]
        with pytest.raises(UsageError, match="one sequence can be streamed, and 2"):
            made[0].generate(["a", "b"], stream=print)
        room = POSITIONS - len(made[0].encode(PROMPT))
        with pytest.raises(UsageError, match=rf"max_new_tokens {room + 1}: .* at most {room} are possible"):
            made[0].generate(PROMPT, max_new_tokens=room + 1)
        with pytest.raises(UsageError, match=r"the prompt has \d+ tokens, and the model 2048 positions"):
            made[0].generate("9 " * 3000)
        made[1].vocabulary = 40
        with pytest.raises(DataError, match="another model's tokenizer"):
            made[0].generate(PROMPT)

    def test_all_positions_can_be_used(self) -> None:
        engine, _ = fake_engine(TOKENIZER)
        room = POSITIONS - len(engine.encode(PROMPT))
        assert engine.generate(PROMPT, max_new_tokens=room, greedy=True) == [
            text_of(greedy_ids(engine.encode(PROMPT), room))
        ]

    @pytest.mark.parametrize("greedy", [True, False])
    def test_not_finite_logits(self, greedy: bool, made: Made) -> None:
        made[1].spoil = True
        with pytest.raises(DataError, match=rf"NaN or infinite after {len(made[0].encode(PROMPT))} tokens"):
            made[0].generate(PROMPT, greedy=greedy)

    @pytest.mark.parametrize("threads", [0, -1, 257, 1.0, True, "2"])
    def test_threads(self, threads: Any) -> None:
        with pytest.raises(UsageError, match=r"threads .*: expected a whole number from 1 to 256"):
            qlm.Engine("nothing", threads=threads)

    def test_head(self) -> None:
        with pytest.raises(UsageError, match="head: 'int4'; expected one of auto, int8, float"):
            qlm.Engine("nothing", head="int4")

    def test_close(self, made: Made) -> None:
        engine, decoder = made
        with engine as same:
            assert same is engine
            engine.generate(PROMPT, max_new_tokens=2)
            assert engine.facts == {"backend": "fake", "threads": 1, "cache_dtype": "float64", "isa": "numpy"}
        assert decoder.closed
        engine.close()
        for call in (lambda: engine.generate(PROMPT), lambda: engine.score([1]), lambda: engine.facts):
            with pytest.raises(UsageError, match="the engine is closed"):
                call()

    def test_a_callback_may_call_its_engine(self, made: Made) -> None:
        """What it computes is neither part of the text around it nor of what `last` says of that."""
        engine, decoder = made
        options: dict[str, Any] = {"max_new_tokens": 12, "seed": 3}
        expected, other = engine.generate(PROMPT, **options), fake_engine(TOKENIZER)[0].generate("a", greedy=True)
        last = engine.last
        engine.forget()
        inner: list[Any] = []

        def stream(piece: str) -> None:
            inner.append(engine.generate("a", greedy=True))
            assert engine.last is not None
            inner.append(engine.last.steps)
            assert len(engine.score([1, 2, 3])) == 2

        assert engine.generate(PROMPT, **options, stream=stream) == expected
        assert len(inner) > 2
        assert inner[::2] == [other] * (len(inner) // 2)
        assert set(inner[1::2]) == {128}
        assert engine.last is not None
        assert last is not None
        for name in ("prompt_tokens", "computed_tokens", "reused_tokens", "new_tokens", "steps"):
            assert getattr(engine.last, name) == getattr(last, name)
        assert sum(map(len, decoder.calls)) > last.steps

    def test_a_callback_may_close_its_engine(self, made: Made) -> None:
        engine, _ = made
        with pytest.raises(UsageError, match="the engine is closed"):
            engine.generate(PROMPT, max_new_tokens=20, greedy=True, stream=lambda piece: engine.close())

    def test_prefill_waits_for_other_calls(self, made: Made) -> None:
        engine, _ = made
        found: list[Any] = []
        with engine._lock:
            thread = threading.Thread(target=lambda: found.append(engine.prefill([np.array([1, 2], np.int32)])))
            thread.start()
            thread.join(0.1)
            assert thread.is_alive()
        thread.join(60)
        ((_, logits),), computed, steps = found[0]
        assert (logits.shape, computed, steps) == ((VOCABULARY,), 2, 1)

    def test_calls_wait_for_each_other(self, made: Made) -> None:
        """Calls of several threads give what they give alone; the decoder is never in two steps at once."""
        engine, decoder = made
        inside, step = threading.Lock(), decoder.step

        def alone(*arguments: Any, **more: Any) -> Any:
            assert inside.acquire(blocking=False)
            try:
                return step(*arguments, **more)
            finally:
                inside.release()

        decoder.step = alone  # type: ignore[method-assign]
        expected = {prompt: fake_engine(TOKENIZER)[0].generate(prompt, max_new_tokens=15, seed=0) for prompt in PROMPTS}
        found: dict[str, list[str]] = {}
        threads = [
            threading.Thread(target=lambda p=prompt: found.update({p: engine.generate(p, max_new_tokens=15, seed=0)}))
            for prompt in PROMPTS
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == expected


@pytest.mark.parametrize(
    "statement", ["import qlm; qlm.Engine", "import qlm.engine.sampling, qlm.engine.text, qlm.engine.options"]
)
def test_import_needs_no_torch(statement: str) -> None:
    code = f"import sys; {statement}; heavy = {{'torch', 'transformers', 'pydantic'}} & sys.modules.keys(); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# --- over the native decoder ------------------------------------------------------------------------------------------

CHECKPOINTS = {
    "tiny-opt": ["The cat sat on the mat", "In the year 1800,", "It is said that"],
    "tiny-gpt-neox": ["It is said that", "In the year 1800,", "The cat sat on the mat"],
    "tiny-gpt-bigcode": ["def main(", "import os\n", "class A:\n    def f(self"],
}


@pytest.mark.skipif(not cpu.available(), reason="qlm was installed without its CPU kernels")
@pytest.mark.parametrize("name", CHECKPOINTS)
class TestNative:
    @pytest.fixture
    def folder(self, name: str) -> Path:
        return ROOT / "evals" / "checkpoints" / name

    def test_greedy_text_is_that_of_transformers(self, name: str, folder: Path) -> None:
        """One prompt of 200 tokens at least; alone, from the cache of the call before, and in a batch."""
        model, tokenizer = qlm.load(folder), qlm.load_tokenizer(folder)
        options = {"max_new_tokens": 200, "greedy": True}
        prompts = CHECKPOINTS[name]
        expected = [qlm.generate(model, tokenizer, prompt, **options) for prompt in prompts]
        penalized = qlm.generate(model, tokenizer, prompts[0], **options, repetition_penalty=1.2)
        assert max(len(tokenizer(text).input_ids) for (text,) in expected) >= 190
        with qlm.Engine(folder) as engine:
            assert [engine.generate(prompt, **options) for prompt in prompts] == expected
            assert engine.generate(prompts[0], **options, repetition_penalty=1.2) == penalized
            assert engine.generate(prompts, **options) == expected
            assert engine.last is not None
            assert engine.last.reused_tokens > 0
            assert engine._end_ids == [tokenizer.eos_token_id]
            assert engine.encode(prompts[0]) == tokenizer(prompts[0]).input_ids

    def test_scores_are_those_of_transformers(self, name: str, folder: Path) -> None:
        model = qlm.load(folder)
        rows = [np.random.default_rng(n).integers(4, 1000, n).tolist() for n in (512, 3, 200, 64, 1)]
        with qlm.Engine(folder, threads=1) as engine:
            for found, row in zip(engine.score(rows), rows, strict=True):
                with torch.no_grad():
                    log_p = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
                np.testing.assert_allclose(
                    found, log_p[:-1].gather(-1, torch.tensor(row)[1:, None])[:, 0], atol=2e-3, rtol=1e-4
                )

    def test_logits_in_pieces(self, name: str, folder: Path) -> None:
        with qlm.Engine(folder, threads=1) as engine:
            rows = [engine.encode(text) for text in CHECKPOINTS[name]] + [[5]]
            scores = engine.score(rows)
            pieces = list(engine.logits(rows, 4))
            assert [len(piece) for piece in pieces[:-1]] == [4] * (len(pieces) - 1)
            logits = np.concatenate(pieces).astype(np.float64)
            assert len(logits) == sum(len(row) - 1 for row in rows)
            following = np.concatenate([row[1:] for row in rows]).astype(int)
            log_p = logits[np.arange(len(logits)), following] - np.log(np.exp(logits).sum(-1))
            np.testing.assert_allclose(log_p, np.concatenate(scores), atol=1e-4)

    def test_mapped_files_outlive_the_engine(self, name: str, folder: Path) -> None:
        with qlm.Engine(folder, threads=1) as engine:
            files = engine.mappings()
        gc.collect()
        assert sum(file.nbytes for file in files) == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert all(bytes(file[:8]) for file in files)
        with pytest.raises(UsageError, match="the engine is closed"):
            engine.mappings()

    def test_samples_do_not_depend_on_threads_or_company(self, name: str, folder: Path) -> None:
        prompts = CHECKPOINTS[name]
        options = {"max_new_tokens": 30, "seed": 5, "num_return_sequences": 2, "top_p": 0.95}
        with qlm.Engine(folder, threads=1) as one, qlm.Engine(folder, threads=2) as two:
            assert one.facts["threads"] == 1
            together = one.generate(prompts, **options)
            assert two.generate(prompts, **options) == together
            assert [two.generate(prompt, **options) for prompt in prompts] == together

    def test_memory_of_the_last_call_is_given_back(self, name: str, folder: Path) -> None:
        with qlm.Engine(folder) as engine:
            engine.generate(CHECKPOINTS[name], max_new_tokens=20, num_return_sequences=2, seed=0)
            assert engine.decoder.cache_bytes > 0
            engine.forget()
            assert engine.decoder.cache_bytes == 0
            engine.score([5] * 40)
            assert engine.decoder.cache_bytes == 0
