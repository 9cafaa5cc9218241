"""What qlm promises on a GPU, as numbers: what was found, what is at least to be reached, and what is aimed at.

Each is a cell of its own. Where one time is over another's the two are taken in turns, in one process. The promises that need files,
a step of QLoRA and GPTQ of a large shape, are finetune_speed.py's and quantize_speed.py's to find; what they are to reach stands here.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_cells import Cell, first_line
from gpu_measure import (
    CHECKED_STEPS,
    Bench,
    Differs,
    GrowingDecoder,
    chosen_by_sdpa,
    compare,
    flash_ran,
    in_ms,
    measure_training,
    only_flash,
    time_rounds,
    tolerance,
)


@dataclass(frozen=True)
class GoalSizes:
    small: str = "opt-350m"
    large: str = "pythia-6.9b"
    prompt: int = 128
    new: int = 64
    rounds: int = 9
    prefill: int = 2048
    batch: int = 8
    length: int = 2048


TINY_GOALS = GoalSizes("tiny", "tiny", prompt=16, new=4, rounds=2, prefill=64, batch=2, length=32)


def goal(what: str, found: float | None, at_least: float, aim: float, more: bool = False) -> dict[str, Any]:
    """One promise and what has become of it. `more`: larger is better."""

    def reached(wanted: float) -> bool | None:
        return None if found is None else bool(found >= wanted if more else found <= wanted)

    return {
        "what": what, "found": None if found is None else float(f"{found:.4g}"), "goal": at_least, "aim": aim,
        "met": reached(at_least), "aim_met": reached(aim),
    }  # fmt: skip


# The shape, and the calibration windows and their tokens, for which `quantizing_goals` hold.
QUANTIZED = ("opt-6.7b", 128, 2048)
FINETUNED = "pythia-1.4b"


def quantizing_goals(minutes: float, peak_gpu_gb: float) -> list[dict[str, Any]]:
    """GPTQ of all of `QUANTIZED`, 4 bits."""
    shape, samples, length = QUANTIZED
    what = f"gptq 4-bit of {shape}, {samples} x {length} tokens: "
    return [goal(what + "minutes", minutes, 10, 4), goal(what + "peak GPU GB", peak_gpu_gb, 12, 8)]


def finetuning_goals(ratio: float) -> list[dict[str, Any]]:
    """A step of QLoRA over plain PEFT's, of `FINETUNED`."""
    return [goal(f"QLoRA of {FINETUNED}: time of a step over plain peft + bitsandbytes", ratio, 1.0, 0.85)]


def in_turns(sides: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one that warms up: clocks and other load hit all alike."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, once in sides.items():
            seconds = once(number)
            if number:
                found[name].append(seconds)
    return found


def recorded(bench: Bench, model: Any, weights: str, sizes: GoalSizes) -> tuple[Any, dict[str, Any]]:
    """A decoder that agrees with a growing cache, and by how much."""
    from qlm.static_decoder import StaticDecoder

    decoder = StaticDecoder(model, 1, sizes.prompt + max(sizes.new, CHECKED_STEPS))
    facts = compare(model, decoder, bench.ids(model, 1, sizes.prompt), tolerance(weights, bench.dtype))
    return decoder, {**facts, "graph": decoder.graph is not None}


def goal_decoding(bench: Bench, sizes: GoalSizes) -> dict[str, Any]:
    model = bench.build(sizes.small, "float")
    decoder, facts = recorded(bench, model, "float", sizes)
    _, step = time_rounds(bench, decoder, sizes.prompt, sizes.new, sizes.rounds)
    # What transformers needs for the same, for the reader.
    _, grown = time_rounds(bench, GrowingDecoder(model, 1), sizes.prompt, sizes.new, min(3, sizes.rounds))
    found = {**in_ms("step", step), **in_ms("growing_step", grown)}
    what = f"{sizes.small}, {bench.dtype}, batch 1, prompt of {sizes.prompt}: ms a token, recorded"
    return {"goals": [goal(what, found["step_ms"], 1.5, 0.8)], **found, **facts}


def goal_quantized_decoding(bench: Bench, weights: str, sizes: GoalSizes) -> dict[str, Any]:
    from qlm.gpu_bench import time_once

    models = {"float": bench.build(sizes.small, "float"), weights: bench.build(sizes.small, weights)}
    sides, facts = {}, {}
    for name, model in models.items():
        decoder, facts[name] = recorded(bench, model, name, sizes)
        sides[name] = lambda seed, decoder=decoder: time_once(decoder, sizes.prompt, sizes.new, bench.device, seed)[1]
    times = in_turns(sides, sizes.rounds)
    ratio = statistics.median(times[weights]) / statistics.median(times["float"])
    what = f"{sizes.small}, batch 1: {weights} over {bench.dtype}, time of a recorded step"
    found = {name: {**in_ms("step", times[name]), **facts[name]} for name in models}
    return {"goals": [goal(what, ratio, 1.1, 0.8)], "sides": found}


def goal_bandwidth(bench: Bench, sizes: GoalSizes) -> dict[str, Any]:
    from qlm.gpu_bench import copy_bandwidth, weight_bytes

    model = bench.build(sizes.large, "gptq-4bit")
    decoder, facts = recorded(bench, model, "gptq-4bit", sizes)
    bench.reset_peak()
    _, step = time_rounds(bench, decoder, sizes.prompt, sizes.new, sizes.rounds)
    peak, read, copied = bench.peak_mib(), weight_bytes(model), copy_bandwidth(bench.device)
    rate = read / statistics.median(step)
    what = f"{sizes.large}, gptq 4-bit, batch 1: weight bytes read per second over a copy's"
    return {
        "goals": [goal(what, rate / copied, 0.5, 0.75, more=True)], **in_ms("step", step), "weight_bytes": read,
        "read_gb_per_s": float(f"{rate / 1e9:.5g}"), "copy_gb_per_s": float(f"{copied / 1e9:.5g}"), "peak_mib": peak, **facts,
    }  # fmt: skip


def goal_prefill(bench: Bench, sizes: GoalSizes) -> dict[str, Any]:
    models = {name: bench.build(sizes.large, name, bench.goal_dtype) for name in ("float", "int8")}
    ids = bench.ids(models["float"], 1, sizes.prefill)
    flash = {name: flash_ran(model, ids) for name, model in models.items()}
    backend = {
        name: chosen_by_sdpa(lambda model=model: model(input_ids=ids, use_cache=False))
        for name, model in models.items()
    }

    def once(name: str, seed: int) -> float:
        decoder, other = GrowingDecoder(models[name], 1), bench.ids(models[name], 1, sizes.prefill, seed)
        bench.finish()
        with only_flash(flash[name]):
            began = time.perf_counter()
            logits = decoder.prefill(other)
            bench.finish()
            seconds = time.perf_counter() - began
        if not bool(logits.isfinite().all()):
            raise Differs(f"{name}: the logits are not finite")
        return seconds

    times = in_turns({name: partial(once, name) for name in models}, sizes.rounds)
    ratio = statistics.median(times["int8"]) / statistics.median(times["float"])
    what = f"{sizes.large}, prompt of {sizes.prefill}: int8 over {bench.goal_dtype}, time of prefill"
    found = {
        name: {**in_ms("prefill", times[name]), "flash": flash[name], "sdpa_backend": backend[name]} for name in models
    }
    return {"goals": [goal(what, ratio, 1.0, 0.65)], "sides": found}


def goal_training(bench: Bench, sizes: GoalSizes) -> dict[str, Any]:
    sides: dict[str, Any] = {
        "sdpa": measure_training(bench, sizes.small, "sdpa", sizes.batch, sizes.length, sizes.rounds)
    }
    try:
        sides["eager"] = measure_training(bench, sizes.small, "eager", sizes.batch, sizes.length, min(3, sizes.rounds))
    except torch.OutOfMemoryError as error:
        # What SDPA needs is worth knowing all the same.
        sides["eager"] = {"batch_ms": None, "peak_mib": None, "not_run": f"out of memory: {first_line(error)}"}

    def over(key: str) -> float | None:
        a, b = sides["sdpa"][key], sides["eager"][key]
        return None if a is None or b is None else a / b

    what = f"training, {sizes.small}, batch {sizes.batch} x {sizes.length}: SDPA over eager, "
    goals = [goal(what + "time", over("batch_ms"), 0.3, 0.2), goal(what + "memory", over("peak_mib"), 0.3, 0.2)]
    return {"goals": goals, "sides": sides}


def goal_cells(bench: Bench, sizes: GoalSizes) -> Iterator[Cell]:
    def cell(name: str, shape: str, measure: Callable[..., dict[str, Any]], *more: Any) -> Cell:
        return Cell(f"goal {name} {shape}", {"part": "goals", "shape": shape}, partial(measure, bench, *more, sizes))

    yield cell("decoding", sizes.small, goal_decoding)
    for weights in ("gptq-4bit", "int8"):
        yield cell(f"decoding {weights}", sizes.small, goal_quantized_decoding, weights)
    yield cell("training", sizes.small, goal_training)
    yield cell("bandwidth gptq-4bit", sizes.large, goal_bandwidth)
    yield cell("prefill int8", sizes.large, goal_prefill)
