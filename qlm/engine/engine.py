"""Text and log-probabilities on a CPU from a checkpoint folder, every step of the model one native call.

`Engine` adds to `decoder.Decoder` what a user needs: prompts in, text out. It decides which tokens go through the model
together and which need not go through it again:

- Sequences of different lengths decode side by side, one native step per token for all that have not ended; nothing is padded.
- Prompts are computed a bounded number of tokens at a time, so that memory for activations does not grow with them.
- What several prompts of a call begin with is computed once, and their caches fork from there; so do several
  continuations of one prompt. What a prompt has in common with a sequence of the last call is not computed again.

Neither torch nor transformers is needed here. What it refuses is what `qlm.generate` refuses, and ids that the model does not have.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from qlm.arch import FamilySpec
from qlm.engine.decoder import Cache, Decoder
from qlm.engine.options import Options
from qlm.engine.sampling import choose, generator_of
from qlm.engine.text import TextWriter
from qlm.engine.weights import Weights
from qlm.errors import UsageError
from qlm.kernels import cpu
from qlm.tokenizer import read_tokenizer, stop_ids

Ids = NDArray[np.int32]
Logits = NDArray[np.float32]

# Tokens in one native step while prompts are computed: enough for the kernels' full speed, and a bound for their scratch memory.
CHUNK = 512
# A step for a few tokens costs about as much as reading the weights once. A common beginning shorter than this is cheaper
# computed for each prompt than in a step of its own.
SHARED_AT_LEAST = 16


@dataclass(frozen=True)
class CallStatistics:
    """What the last call of `Engine.generate` did.

    Attributes:
        prompt_tokens: of all prompts together.
        computed_tokens: prompt tokens that went through the model.
        reused_tokens: prompt tokens that did not have to: from the last call, or common to several prompts.
        new_tokens: tokens drawn, EOS included.
        steps: native calls.
        prefill_seconds, decode_seconds: up to the logits of the first new tokens, and from there on.
    """

    prompt_tokens: int
    computed_tokens: int
    reused_tokens: int
    new_tokens: int
    steps: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(eq=False)
class _Node:
    """A stretch of prompt: `ids[start:]` go through the model after what came before in `cache`.

    Attributes:
        ids: the whole prompt from its first token to the stretch's last.
        ends_prompt: some prompt ends here, so that the last token's logits are wanted.
        next: stretches that continue this one.
        done: how many of `ids` are in the cache.
    """

    ids: Ids
    start: int
    ends_prompt: bool
    next: list["_Node"] = field(default_factory=list)
    cache: Any = None
    done: int = 0


@dataclass(eq=False)
class _Sequence:
    """A text that is being written.

    Attributes:
        ids: int64 [positions], the first `length` of them given or drawn so far.
    """

    cache: Any
    ids: NDArray[np.int64]
    length: int
    left: int
    writer: TextWriter
    generator: np.random.Generator

    def add(self, logits: Logits, options: Options) -> None:
        """Draw the next token and write it."""
        index = choose(logits, self.ids[: self.length], options, self.generator)
        self.ids[self.length] = index
        self.length += 1
        self.left -= 1
        self.writer.put(index)

    @property
    def ended(self) -> bool:
        return self.writer.ended or self.left == 0


class Engine:
    """A model of one of the three families on a CPU: float, int8, GPTQ or NF4, from the checkpoint's own files.

    Use it as a context manager, or `close` it. Calls from several threads wait for each other; a `stream` callback may call
    the engine it is called by.

    Attributes:
        last: what the last `generate` did; None before the first.
    """

    last: CallStatistics | None

    def __init__(
        self,
        path: str | Path,
        *,
        revision: str | None = None,
        threads: int | None = None,
        head: str = "auto",
        cache_dtype: str = "auto",
        adapter: str | Path | None = None,
    ) -> None:
        """
        Args:
            path: a model folder, or a model on the hub.
            revision: commit, tag or branch of a model on the hub.
            threads: 1 to 256. None: all cores that this process may use.
            head: what the language-model head's matrix is held as: "float", as the file has it; "int8", quantized while
                loading; "auto": int8 for a quantized checkpoint, float for a float one.
            cache_dtype: of keys and values: "float32", "float16", "bfloat16" or "int8"; "auto": float16 for a quantized
                checkpoint, float32 for a float one.
            adapter: folder of a LoRA adapter, which is computed beside the weights in float32.

        Raises UsageError for options, Unavailable where the native library is not built or cannot run, and what
        opening a checkpoint raises (checkpoint/reader.py).
        """
        if threads is not None and (
            not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= cpu.MOST_THREADS
        ):
            raise UsageError(f"threads {threads!r}: expected a whole number from 1 to {cpu.MOST_THREADS}")
        weights = Weights.open(path, revision, head, threads, adapter)
        self._set_up(Decoder(weights, threads, cache_dtype), weights)

    def _set_up(self, decoder: Any, weights: Any) -> None:
        """`decoder`: a `Decoder` over `weights`, or what a test has in their place."""
        self._decoder = decoder
        self._opened = weights
        self._lock = threading.RLock()
        self._kept: list[tuple[Ids, Any]] = []  # (ids that a cache holds, the cache) of the last call's sequences
        self.last = None

    @property
    def spec(self) -> FamilySpec:
        """The model's family."""
        spec: FamilySpec = self._weights.spec
        return spec

    @property
    def config(self) -> Mapping[str, Any]:
        """The checked fields of config.json."""
        config: Mapping[str, Any] = self._weights.config
        return config

    @property
    def decoder(self) -> Decoder:
        """What computes. Raises UsageError after `close`."""
        if self._decoder is None:
            raise UsageError("the engine is closed")
        decoder: Decoder = self._decoder
        return decoder

    @property
    def _weights(self) -> Any:
        if self._opened is None:
            raise UsageError("the engine is closed")
        return self._opened

    @property
    def facts(self) -> dict[str, Any]:
        """What is running: `Weights.facts`, threads, cache_dtype, and isa, the instruction set."""
        return {**self._weights.facts, **self.decoder.facts}

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's `tokenizers.Tokenizer`, BOS by the family's rule. Read when it is first asked for."""
        return read_tokenizer(self._weights.checkpoint)

    @cached_property
    def _end_ids(self) -> list[int]:
        return stop_ids(self.config, self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, BOS by the family's rule."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if not self.spec.bos_first:
            return ids
        assert self.spec.bos_id is not None
        return [self.spec.bos_id, *ids]

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str, *, max_new_tokens: int = 128, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, repetition_penalty: float = 1.0, num_return_sequences: int = 1,
        seed: int | None = None, greedy: bool = False, stop: Sequence[str] = (),
        stream: Callable[[str], None] | None = None,
    ) -> list[str]: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: Sequence[str], *, max_new_tokens: int = 128, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, repetition_penalty: float = 1.0, num_return_sequences: int = 1,
        seed: int | None = None, greedy: bool = False, stop: Sequence[str] = (),
        stream: Callable[[str], None] | None = None,
    ) -> list[list[str]]: ...  # fmt: skip

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        num_return_sequences: int = 1,
        seed: int | None = None,
        greedy: bool = False,
        stop: Sequence[str] = (),
        stream: Callable[[str], None] | None = None,
    ) -> list[str] | list[list[str]]:
        """The texts that the model writes after a prompt, without the prompt, up to EOS, a stop string or `max_new_tokens`.

        Args:
            prompt: a text, or several; an empty one is allowed where the family's rule gives a BOS (OPT).
            max_new_tokens: at least 1; prompt and new tokens together fit the model's positions.
            temperature: above 0; divides the logits.
            top_k: draw from the so many most likely tokens only.
            top_p: draw from the fewest most likely tokens only whose probabilities sum to this; above 0, at most 1.
            repetition_penalty: above 0; above 1 makes tokens of prompt and text so far less likely (arXiv:1909.05858).
            num_return_sequences: independent draws for each prompt.
            seed: 0 to 2^64 - 1. The text of the n-th sequence of a prompt depends on the prompt, the options, the seed
                and n alone: not on threads, other prompts or calls before (up to the rounding of the model's arithmetic).
                So equal prompts of one call give equal texts. None: different draws every time.
            greedy: always the most likely token. Excludes the options of sampling.
            stop: a text ends before the first of these that the model writes.
            stream: called with each piece of text as soon as it is certain to belong to the text; the pieces joined are
                the result. For one sequence only.

        Returns the texts of the one prompt, or those of each prompt where several are given.

        Raises UsageError for options and prompts, DataError for a tokenizer or logits that cannot be right.
        """
        options = Options(
            max_new_tokens, temperature, top_k, top_p, repetition_penalty, num_return_sequences, seed, greedy, stop
        )  # fmt: skip
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not all(isinstance(text, str) for text in texts):
            raise UsageError("prompt: expected a text, or a list of texts")
        if stream is not None:
            options.check_stream(len(texts) * num_return_sequences)
        if not texts:
            return []
        with self._lock:
            decoder = self.decoder
            prompts = [self.encode(text) for text in texts]
            for ids in prompts:
                options.check_prompt(ids, self.spec, decoder.positions, decoder.vocabulary)
            written = self._generate([np.array(ids, np.int32) for ids in prompts], options, stream)
        rows = [written[i : i + num_return_sequences] for i in range(0, len(written), num_return_sequences)]
        return rows[0] if isinstance(prompt, str) else rows

    def _generate(self, prompts: list[Ids], options: Options, stream: Callable[[str], None] | None) -> list[str]:
        """The texts of all sequences, those of a prompt side by side."""
        started = time.perf_counter()
        prefilled, computed, steps = self.prefill(prompts)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        sequences: list[_Sequence] = []
        first: list[Logits] = []
        for ids, (cache, logits) in zip(prompts, prefilled, strict=True):
            for number in range(options.num_return_sequences):
                room = np.zeros(len(ids) + options.max_new_tokens, np.int64)
                room[: len(ids)] = ids
                writer = TextWriter(decode, self._end_ids, options.stop, stream)
                generator = generator_of(options.seed, number)
                sequences.append(_Sequence(cache.fork(), room, len(ids), options.max_new_tokens, writer, generator))
                first.append(logits)
        del prefilled, cache, logits  # the memory of prompts whose forks have ended
        prefill_ended = time.perf_counter()
        for sequence, logits in zip(sequences, first, strict=True):
            sequence.add(logits, options)
        while active := [sequence for sequence in sequences if not sequence.ended]:
            last = [[int(sequence.ids[sequence.length - 1])] for sequence in active]
            steps += 1
            for sequence, logits in zip(active, self.decoder.step([s.cache for s in active], last), strict=True):
                sequence.add(logits, options)
        written = [sequence.writer.end() for sequence in sequences]
        total = sum(map(len, prompts))
        self._kept = [(s.ids[: s.cache.length].astype(np.int32), s.cache) for s in sequences]
        self.last = CallStatistics(
            prompt_tokens=total,
            computed_tokens=computed,
            reused_tokens=total - computed,
            new_tokens=sum(options.max_new_tokens - s.left for s in sequences),
            steps=steps,
            prefill_seconds=prefill_ended - started,
            decode_seconds=time.perf_counter() - prefill_ended,
        )
        return written

    def prefill(self, prompts: Sequence[Ids]) -> tuple[list[tuple[Cache, Logits]], int, int]:
        """Send prompts through the model: for each its cache and last logits [V]; how many tokens were computed for all, and in
        how many steps.

        Part of `generate`, and what `bench` measures. Equal prompts share a cache: fork it before adding to it.

        Args:
            prompts: ids, int32 [T] each, at least one, in the vocabulary.
        """
        with self._lock:
            return self._prefill(prompts)

    def _prefill(self, prompts: Sequence[Ids]) -> tuple[list[tuple[Cache, Logits]], int, int]:
        unique = {ids.tobytes(): ids for ids in prompts}
        # What is kept of the last call serves this one or goes, before this one needs memory.
        kept, self._kept = self._kept, []
        roots = _plan(list(unique.values()))
        _take_kept(roots, kept)
        del kept
        found: dict[bytes, tuple[Cache, Logits]] = {}
        computed = steps = 0
        ready: deque[_Node] = deque()

        def start(nodes: list[_Node], before: Any) -> None:
            """Make nodes ready whose beginning is in the cache `before`; those that have nothing to compute are done."""
            for node in nodes:
                if node.cache is None:
                    node.cache = self.decoder.new_cache() if before is None else before.fork()
                    node.done = node.start
                if node.done == len(node.ids):
                    start(node.next, node.cache)
                else:
                    ready.append(node)

        start(roots, None)
        while ready:
            batch: list[tuple[_Node, int]] = []
            room = CHUNK
            for node in ready:
                if room == 0:
                    break
                batch.append((node, min(room, len(node.ids) - node.done)))
                room -= batch[-1][1]
            ends = [node.ends_prompt and node.done + count == len(node.ids) for node, count in batch]
            steps += 1
            ids: list[Any] = [node.ids[node.done : node.done + count] for node, count in batch]
            logits = self.decoder.step([node.cache for node, _ in batch], ids, want_logits=any(ends))
            for row, ((node, count), is_end) in enumerate(zip(batch, ends, strict=True)):
                node.done += count
                computed += count
                if is_end and logits is not None:
                    found[node.ids.tobytes()] = node.cache, logits[row].copy()
            while ready and ready[0].done == len(ready[0].ids):
                node = ready.popleft()
                start(node.next, node.cache)
        return [found[ids.tobytes()] for ids in prompts], computed, steps

    def mappings(self) -> list[NDArray[np.uint8]]:
        """The bytes of each mapped file, which stays mapped as long as its array lives."""
        mappings: list[NDArray[np.uint8]] = self._weights.checkpoint.mappings()
        return mappings

    @overload
    def score(self, ids: Sequence[int] | NDArray[Any]) -> Logits: ...

    @overload
    def score(self, ids: Sequence[Sequence[int]] | Sequence[NDArray[Any]]) -> list[Logits]: ...

    def score(self, ids: Any) -> Logits | list[Logits]:
        """Natural-log probability of each token but the first, given those before it: log p(ids[1:]), float32.

        Args:
            ids: token ids [T], or a list of such; BOS is not added. At most as many as the model has positions.

        Raises UsageError for a row without ids, too many, or one that the model does not have.
        """
        single = len(ids) > 0 and np.ndim(ids[0]) == 0
        with self._lock:
            rows = [self._checked_ids(row) for row in ([ids] if single else ids)]
            scored = self._score(rows)
        return scored[0] if single else scored

    def _score(self, rows: list[Ids]) -> list[Logits]:
        pieces: list[list[Logits]] = [[np.zeros(0, np.float32)] for _ in rows]
        for batch, caches in self._batches(rows, CHUNK):
            ids: list[Any] = [rows[row][begin:end] for row, begin, end in batch]
            following: list[Any] = [rows[row][begin + 1 : end + 1] for row, begin, end in batch]
            for (row, _, _), values in zip(batch, self.decoder.score(caches, ids, following), strict=True):
                pieces[row].append(values)
        return [np.concatenate(parts) for parts in pieces]

    def logits(self, rows: Sequence[Sequence[int] | NDArray[Any]], most: int) -> Iterator[Logits]:
        """Logits of each token of each row but its last one, row after row, `most` tokens at a time: float32 [most, V], the last
        ones fewer. Nothing is computed that is not asked for.

        Raises as `score`.
        """
        checked = [self._checked_ids(row) for row in rows]
        for batch, caches in self._batches(checked, most):
            ids: list[Any] = [checked[row][begin:end] for row, begin, end in batch]
            found = self.decoder.logits(caches, ids)
            yield found[0] if len(found) == 1 else np.concatenate(found)

    def _batches(self, rows: list[Ids], most: int) -> Iterator[tuple[list[tuple[int, int, int]], list[Any]]]:
        """Rows without their last tokens, which nothing follows, in pieces of `most` tokens together (`_pieces`), and the caches
        of each piece's rows.
        """
        lengths = [len(ids) - 1 for ids in rows]
        caches: dict[int, Any] = {}
        for batch in _pieces(lengths, most):
            for row, begin, _ in batch:
                if begin == 0:
                    caches[row] = self.decoder.new_cache()
            yield batch, [caches[row] for row, _, _ in batch]
            for row, _, end in batch:
                if end == lengths[row]:
                    del caches[row]

    def _checked_ids(self, ids: Any) -> Ids:
        found = np.asarray(ids)
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or not len(found):
            raise UsageError(f"ids: found {found.dtype} {list(found.shape)}; expected at least one token id, [T]")
        if len(found) > self.decoder.positions:
            raise UsageError(f"ids: {len(found)} tokens; the model has {self.decoder.positions} positions")
        least, most = int(found.min()), int(found.max())
        if least < 0 or most >= self.decoder.vocabulary:
            wrong = least if least < 0 else most
            raise UsageError(f"ids: found {wrong}; the model has the ids 0 to {self.decoder.vocabulary - 1}")
        return found.astype(np.int32)

    def forget(self) -> None:
        """Free the keys and values that are kept of the last call."""
        with self._lock:
            self._kept = []

    def close(self) -> None:
        """Free everything, after the calls that are running. The engine cannot be used afterwards."""
        with self._lock:
            if self._decoder is not None:
                self._kept = []
                self._decoder.close()
                # The mapped files, and what was made from them, go with the last reference.
                self._decoder = self._opened = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _pieces(lengths: list[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Rows after each other, cut every `most` tokens: (row, its first token, the one after its last) of what lies between cuts."""
    batch: list[tuple[int, int, int]] = []
    room = most
    for row, length in enumerate(lengths):
        begin = 0
        while begin < length:
            end = min(begin + room, length)
            batch.append((row, begin, end))
            begin, room = end, room - (end - begin)
            if room == 0:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


def _common(a: Ids, b: Ids) -> int:
    """How many ids two sequences begin with alike."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def _plan(prompts: list[Ids]) -> list[_Node]:
    """Different prompts as a forest: what several begin with is one node, where it is long enough to be worth a step."""
    roots: list[_Node] = []
    # Groups of prompts, in lexical order, that agree on their first `agreed` ids, of which `start` belong to nodes above.
    groups = [(sorted(prompts, key=lambda ids: ids.tolist()), 0, 0, roots)]
    while groups:
        group, start, agreed, nodes = groups.pop()
        at = 0
        while at < len(group):
            # In lexical order, prompts with the same id at `agreed` are neighbours; one that ends there comes first.
            ids, end = group[at], at + 1
            while len(ids) > agreed and end < len(group) and group[end][agreed] == ids[agreed]:
                end += 1
            branch = group[at:end]
            at = end
            common = _common(branch[0], branch[-1])
            if len(branch) > 1 and common - start < SHARED_AT_LEAST:
                groups.append((branch, start, common, nodes))
                continue
            node = _Node(ids[:common], start, ends_prompt=len(ids) == common)
            nodes.append(node)
            groups.append((branch[node.ends_prompt :], common, common, node.next))
    return roots


def _take_kept(roots: list[_Node], kept: list[tuple[Ids, Any]]) -> None:
    """Give nodes the longest beginning of theirs that a kept cache holds, where it is longer than what comes from the node before."""
    nodes = list(roots)
    while nodes:
        node = nodes.pop()
        nodes += node.next
        # The logits of a prompt's last token are not kept: it is always computed.
        most = len(node.ids) - node.ends_prompt
        lengths = [min(most, _common(node.ids, ids)) for ids, _ in kept]
        best = max(range(len(kept)), key=lengths.__getitem__, default=None)
        if best is not None and lengths[best] > node.start:
            node.cache = kept[best][1].fork()
            node.cache.truncate(lengths[best])
            node.done = lengths[best]
