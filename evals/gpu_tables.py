"""Speed and memory on a GPU: the tables of transformers' OPT page, and what qlm promises there. Needs no network.

    python evals/gpu_tables.py [--part goals|inference|training|all] [--shapes NAME ...] [--seconds N] [--out FOLDER]
    python evals/gpu_tables.py --device cpu --shapes tiny      the same code on a CPU, in seconds: tests the script itself

Models have random weights (random_models.py) and are made on the GPU. The tables: OPT-350m's shape in fp16 by eager attention, SDPA and
flash-attn, int8, NF4 and GPTQ of 4 bits; inference by transformers' own loop with a cache that grows and by qlm's recorded steps; training
for the float model. The same for Pythia-1.4B's and SantaCoder's shapes, with fewer sizes. What lacks a package says so; a recorded step must
give the logits of the loop with a growing cache before it is timed.

Writes gpu_tables-GPU.json (rows replace those of the same name) and .md into the folder after every cell. `--seconds` starts no cell after so
many; `--missing` measures what the file has not. Exit code 69 where there is no GPU, 1 if a cell failed. The last line printed is JSON.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_cells import NO_GPU, Cell, Results, Resumption, add_options, results_folder, run_cells, say_goal, supervised
from gpu_tables_page import page
from shared import cpu_name, driver_version, slug, use_checkout, versions

if TYPE_CHECKING:
    from gpu_measure import Bench

# torch is imported where it is used: the process that only watches another one is there at once.

PARTS = ("goals", "inference", "training")

# Weights and attention of the models that are compared.
SIDES = (
    ("float", "eager"), ("float", "sdpa"), ("float", "flash_attention_2"), ("int8", "sdpa"), ("nf4", "sdpa"), ("gptq-4bit", "sdpa"),
)  # fmt: skip
LOOPS = ("growing", "recorded")


@dataclass(frozen=True)
class Sizes:
    """Of a shape's tables: every batch with every number of tokens. `new` tokens are decoded in each of `rounds` rounds."""

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    training_batches: tuple[int, ...]
    lengths: tuple[int, ...]
    new: int = 16
    rounds: int = 5


TABLES = {
    "opt-350m": Sizes((1, 2, 4, 8), (128, 256, 512, 1024), (1, 2, 4, 8), (128, 256, 512, 1024, 2048)),
    "pythia-1.4b": Sizes((1, 8), (128, 1024), (1, 8), (512, 2048)),
    "santacoder-1.1b": Sizes((1, 8), (128, 1024), (1, 8), (512, 2048)),
    "tiny": Sizes((1, 2), (16,), (2,), (16, 32), new=2, rounds=1),
}


def table_cells(bench: "Bench", part: str, shape: str) -> Iterator[Cell]:
    from gpu_measure import measure_inference, measure_training

    sizes, named = TABLES[shape], {"part": part, "shape": shape, "dtype": bench.dtype}
    if part == "training":
        for attention in dict.fromkeys(attention for _, attention in SIDES):
            for batch in sizes.training_batches:
                for length in sizes.lengths:
                    yield Cell(
                        f"training {shape} {attention} batch {batch} tokens {length}",
                        {**named, "weights": "float", "attention": attention, "batch": batch, "tokens": length},
                        partial(measure_training, bench, shape, attention, batch, length, sizes.rounds),
                    )
        return
    for weights, attention in SIDES:
        for batch in sizes.batches:
            for prompt in sizes.prompts:
                for loop in LOOPS:
                    if attention == "flash_attention_2" and loop == "recorded":
                        continue
                    keys = {"weights": weights, "attention": attention, "loop": loop, "batch": batch, "tokens": prompt}
                    what = (shape, weights, attention, loop, batch, prompt)
                    yield Cell(
                        f"inference {shape} {weights} {attention} {loop} batch {batch} tokens {prompt}",
                        {**named, **keys},
                        partial(measure_inference, bench, *what, sizes.new, sizes.rounds),
                    )


# The command ----------------------------------------------------------------------------------------------------------


def all_cells(bench: "Bench", part: str, shapes: list[str]) -> Iterator[Cell]:
    """What matters most comes first."""
    from gpu_goals import TINY_GOALS, GoalSizes, goal_cells

    if part in ("goals", "all"):
        yield from goal_cells(bench, TINY_GOALS if shapes == ["tiny"] else GoalSizes())
    for shape in shapes:
        for one in ("inference", "training"):
            if part in (one, "all"):
                yield from table_cells(bench, one, shape)


def say(row: dict[str, Any]) -> None:
    if row["ok"] is True and "goals" in row:
        text = "; ".join(say_goal(one) for one in row["goals"])
    elif row["ok"] is True:
        units = {"step_ms": "ms a step", "batch_ms": "ms a batch", "prefill_ms": "ms prefill", "peak_mib": "MiB"}
        text = ", ".join(f"{row[key]} {unit}" for key, unit in units.items() if row.get(key) is not None)
    elif row["ok"] is None:
        text = f"not run: {row['not_run']}"
    else:
        text = f"FAILED: {row['error']}"
    print(f"{row['name']}: {text}", flush=True)


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--part", choices=(*PARTS, "all"), default="all")
    arguments.add_argument(
        "--shapes", nargs="+", choices=TABLES, default=[name for name in TABLES if name != "tiny"],
        help="of the tables; goals have shapes of their own, which --shapes tiny makes tiny as well",
    )  # fmt: skip
    arguments.add_argument("--missing", action="store_true", help="only cells that the file has no figures for")
    arguments.add_argument("--out", type=Path, help="folder of the results; $OUT or evals/results by default")
    arguments.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    add_options(arguments)
    return arguments.parse_args()


def main() -> int:
    options = parse()
    if options.progress is None:
        # This process has no GPU to lose: another one measures, and is started again where it dies.
        return supervised(__file__, options.seconds)
    import torch

    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print(
            "gpu_tables: torch sees no CUDA GPU here; nothing was measured (--device cpu tests the script)",
            file=sys.stderr,
        )
        return NO_GPU
    use_checkout()
    import transformers
    from gpu_measure import Bench

    from qlm.kernels import ops

    transformers.logging.set_verbosity_error()
    # Recording a graph collects garbage first; what has been imported is none.
    gc.freeze()
    device_name = torch.cuda.get_device_name(options.device) if on_gpu else "cpu"
    machine = {
        "device": device_name, "cpu": cpu_name(), "driver": driver_version() if on_gpu else None, "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability(options.device)) if on_gpu else None,
        "memory_gib": round(torch.cuda.get_device_properties(options.device).total_memory / 2**30, 1) if on_gpu else None,
        # Where the kernels cannot run, plain torch computes, and the figures are those of something else.
        "kernels": {op: ops.kernel(op, "cuda" if on_gpu else "cpu") for op in ("gptq_linear", "int8_linear")},
    }  # fmt: skip
    results = Results(
        results_folder(options.out) / f"gpu_tables-{slug(device_name)}.json",
        {"machine": machine, "versions": versions()},
        page,
    )
    bench = Bench(options.device)
    cells = list(all_cells(bench, options.part, options.shapes))
    if options.missing:
        cells = results.missing(cells, options.after)
    resumption = Resumption.of(options)
    # On a CPU kernels of 4-bit formats would round activations, differently for one token and for many.
    with nullcontext() if on_gpu else ops.float_activations():
        again = run_cells(cells, results, resumption, device=options.device, until=float(options.until), say=say)
    if again is not None:
        return again
    rows, left_out = results.of_last_call(cells)
    summary = {
        "device": device_name,
        "cells": len(rows),
        "ok": sum(row["ok"] is True for row in rows),
        "failed": [row["name"] for row in rows if row["ok"] is False],
        "not_run": sum(row["ok"] is None for row in rows),
        "left_out": len(left_out),
        "goals": {
            one["what"]: [one["found"], one["met"]] for row in results.rows().values() for one in row.get("goals", ())
        },
    }
    if left_out:
        print(f"left out, the time being over: {'; '.join(left_out)}")
    print(f"written: {results.path} and .md")
    print(json.dumps(summary))
    resumption.over()
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
