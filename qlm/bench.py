"""How fast the CPU engine runs a model here, beside what the machine's memory allows.

Decoding reads all weights once for every step: the ceiling is the machine's memory bandwidth, which is measured in the same
run, by the same threads, over the same mapped files (kernels: `qlm_read_bandwidth`). On shared machines it changes from minute to
minute, so a reading is taken after every repeat, and all figures are medians; the best stand beside them. Files that fit into
the CPU's caches say nothing of the memory: there is no ceiling for them.

Torch-free, so that peak memory is the engine's.
"""

import ctypes
import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlm.engine.engine import Engine
from qlm.errors import UsageError
from qlm.kernels import cpu
from qlm.memory import cache_bytes, peak_memory


@dataclass(frozen=True)
class Bench:
    """The result of `bench`. GB are 10^9 bytes; times are medians, `_best` the best, of `repeats`.

    Attributes:
        prefill_ms: from the prompts' ids to the logits of their last tokens, all `batch` prompts together.
        decode_ms_per_token: of a step over the batch, divided by `batch`; 1000 / `decode_tokens_per_s`.
        weight_bytes_per_token: that a decode step reads, whatever the batch.
        read_gb_per_s: those over the time of a step. ceiling_gb_per_s: at which the same threads read the mapped
            files and do nothing else. ceiling_share: the first over the second. Both are None where `no_ceiling` says why.
        peak_rss_gb: of the whole process, mapped weights included.
        checkpoint_gb: all tensors in the files.
        load_s: from the path to a model that is ready. first_token_s: from the path to the first prompt's logits.
    """

    model: str
    backend: str
    head: str
    cache_dtype: str
    threads: int
    isa: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_ms: float
    prefill_ms_best: float
    prefill_tokens_per_s: float
    decode_ms_per_token: float
    decode_ms_per_token_best: float
    decode_tokens_per_s: float
    weight_bytes_per_token: int
    read_gb_per_s: float
    ceiling_gb_per_s: float | None
    ceiling_share: float | None
    no_ceiling: str | None
    peak_rss_gb: float
    checkpoint_gb: float
    load_s: float
    first_token_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain values by field name, floats to five significant digits."""
        return plain(dataclasses.asdict(self))


def bench(
    model: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch: int = 1,
    repeats: int = 5,
    revision: str | None = None,
    threads: int | None = None,
    head: str = "auto",
    cache_dtype: str = "auto",
) -> Bench:
    """Time prefill and decoding of random token ids; one round more than `repeats` warms up.

    Args:
        model, revision, threads, head, cache_dtype: as for `Engine`.
        prompt_tokens, new_tokens: of each of the `batch` sequences.

    Raises UsageError for sizes below 1 or beyond the model's positions, and what `Engine` raises.
    """
    check_sizes(prompt=prompt_tokens, new=new_tokens, batch=batch, repeats=repeats)
    started = time.perf_counter()
    with Engine(model, revision=revision, threads=threads, head=head, cache_dtype=cache_dtype) as engine:
        load_s = time.perf_counter() - started
        decoder, facts = engine.decoder, engine.facts
        check_positions(prompt_tokens, new_tokens, decoder.positions)
        random = np.random.default_rng(0)
        prompts = [random.integers(0, decoder.vocabulary, prompt_tokens, np.int32) for _ in range(batch)]
        engine.prefill(prompts[:1])
        first_token_s = time.perf_counter() - started
        time_once(engine, prompts, new_tokens)
        # Before the readings of the ceiling, which touch all of the files.
        peak = peak_memory()
        no_ceiling = _why_no_ceiling(engine)
        prefill, step, readings = _rounds(engine, prompts, new_tokens, repeats, with_ceiling=no_ceiling is None)
    prefill_s, step_s = statistics.median(prefill), statistics.median(step)
    read = facts["bytes_per_token"] / step_s / 1e9
    ceiling = statistics.median(readings) if readings else None
    return Bench(
        model=Path(model).name or Path(model).resolve().name,
        backend=facts["backend"],
        head=facts["head"],
        cache_dtype=facts["cache_dtype"],
        threads=facts["threads"],
        isa=facts["isa"],
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        prefill_ms=1e3 * prefill_s,
        prefill_ms_best=1e3 * min(prefill),
        prefill_tokens_per_s=batch * prompt_tokens / prefill_s,
        decode_ms_per_token=1e3 * step_s / batch,
        decode_ms_per_token_best=1e3 * min(step) / batch,
        decode_tokens_per_s=batch / step_s,
        weight_bytes_per_token=facts["bytes_per_token"],
        read_gb_per_s=read,
        ceiling_gb_per_s=ceiling,
        ceiling_share=None if ceiling is None else read / ceiling,
        no_ceiling=no_ceiling,
        peak_rss_gb=peak / 1e9,
        checkpoint_gb=facts["checkpoint_bytes"] / 1e9,
        load_s=load_s,
        first_token_s=first_token_s,
    )


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The same with floats to five significant digits."""
    return {key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in values.items()}


def check_positions(prompt_tokens: int, new_tokens: int, positions: int) -> None:
    """Raises UsageError for more tokens than the model has positions."""
    if prompt_tokens + new_tokens > positions:
        raise UsageError(f"{prompt_tokens} + {new_tokens} tokens: the model has {positions} positions; take fewer")


def check_sizes(**sizes: int) -> None:
    """Raises UsageError for one that is no whole number of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name} {value!r}: expected a whole number of at least 1")


def _why_no_ceiling(engine: Engine) -> str | None:
    """In words, or None where there is one."""
    files, caches = sum(file.nbytes for file in engine.mappings()), cache_bytes()
    if files > caches:
        return None
    return f"the files, {files / 1e6:.1f} MB, fit into the CPU's caches, {caches / 1e6:.1f} MB"


def _rounds(
    engine: Engine, prompts: list[np.ndarray], new_tokens: int, repeats: int, with_ceiling: bool
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of prefill and of a decode step (`time_once`), and GB/s of the ceiling, of each round."""
    prefill, step, ceiling = [], [], []
    with cpu.Team(engine.decoder.threads) as team:
        if with_ceiling:
            _read_bandwidth(team, engine)  # pages of the files that nothing has touched are mapped once
        for _ in range(repeats):
            times = time_once(engine, prompts, new_tokens)
            prefill.append(times[0])
            step.append(times[1])
            if with_ceiling:
                ceiling.append(_read_bandwidth(team, engine))
    return prefill, step, ceiling


def time_once(engine: Engine, prompts: list[np.ndarray], new_tokens: int) -> tuple[float, float]:
    """Seconds of prefill, and of a decode step: the mean over `new_tokens` greedy ones."""
    started = time.perf_counter()
    prefilled, *_ = engine.prefill(prompts)
    last = [[int(logits.argmax())] for _, logits in prefilled]
    prefill_ended = time.perf_counter()
    caches = [cache.fork() for cache, _ in prefilled]  # very short prompts may be equal
    for _ in range(new_tokens):
        logits = engine.decoder.step(caches, last)
        assert logits is not None
        last = [[int(index)] for index in logits.argmax(-1)]
    return prefill_ended - started, (time.perf_counter() - prefill_ended) / new_tokens


def _read_bandwidth(team: cpu.Team, engine: Engine) -> float:
    """GB/s at which the team reads the checkpoint's mapped files."""
    native, total, seconds = cpu.library(), 0, 0.0
    for file in engine.mappings():
        found = ctypes.c_double()
        native.qlm_read_bandwidth(team.handle, file.ctypes.data, file.nbytes, ctypes.byref(found))
        total += file.nbytes
        seconds += file.nbytes / 1e9 / found.value
    return total / 1e9 / seconds
