"""Speed and memory on a GPU: the tables of transformers' OPT page, and what qlm promises there. Needs no network.

    python evals/gpu_tables.py [--part goals|inference|training|all] [--shapes NAME ...] [--seconds N] [--out FOLDER]
    python evals/gpu_tables.py --device cpu --shapes tiny      the same code on a CPU, in seconds: tests the script itself

Models have random weights (random_models.py) and are made on the GPU. The tables: OPT-350m's shape in fp16 by eager attention, SDPA and
flash-attn, int8, NF4 and GPTQ of 4 bits; inference by transformers' own loop with a cache that grows and by qlm's recorded steps; training
of all weights for the float model, through a frozen base for it and the quantized ones. The same for Pythia-1.4B's and SantaCoder's shapes.
The smallest and largest sizes of every shape come first. What lacks a package says so; a recorded step must give the logits of the loop with a
growing cache before it is timed. Beside OPT-350m's figures stand those of the page (opt_page.py).

Writes gpu_tables-GPU.json (rows replace those of the same name) and .md into the folder after every cell. `--seconds` starts no cell after so
many; `--missing` measures what the file has not. Exit code 69 where there is no GPU, 1 if a cell failed. The last line printed is JSON.
"""

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_cells import NO_GPU, Cell, Results, Resumption, add_options, results_folder, run_cells, say_goal, supervised
from opt_page import SHAPE as PAGE_SHAPE
from opt_page import full_page
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
# Of training: what is called in the tables by its first word, weights, attention, and whether these are trained. Quantized weights are not.
TRAINED = (
    *(("float", "float", attention, "trained") for attention in ("eager", "sdpa", "flash_attention_2")),
    ("frozen float", "float", "sdpa", "frozen"),
    *((weights, weights, "sdpa", "frozen") for weights in ("int8", "nf4", "gptq-4bit")),
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of a shape's tables: every batch with every number of tokens. `new` tokens are decoded in each of `rounds` rounds."""

    batches: tuple[int, ...] = (1, 2, 4, 8)
    prompts: tuple[int, ...] = (128, 256, 512, 1024)
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    new: int = 16
    rounds: int = 5
    as_page: bool = False


# The page's, for every shape.
TABLES = {
    PAGE_SHAPE: Sizes(as_page=True),
    "pythia-1.4b": Sizes(),
    "santacoder-1.1b": Sizes(),
    "tiny": Sizes((1, 2), (16,), (16, 24, 32), new=2, rounds=1, as_page=True),
}


def corners_first(
    batches: tuple[int, ...], lengths: tuple[int, ...]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(batch, tokens): the first and last of both with each other, and the rest."""
    everything = list(itertools.product(batches, lengths))
    ends = [(a, b) for a, b in everything if a in (batches[0], batches[-1]) and b in (lengths[0], lengths[-1])]
    return ends, [one for one in everything if one not in ends]


def training_cells(bench: "Bench", shape: str, sizes: Sizes, grid: list[tuple[int, int]]) -> Iterator[Cell]:
    """Cells of one model follow each other, so that it is built once."""
    from gpu_measure import measure_training

    for called, weights, attention, base in TRAINED:
        for batch, length in grid:
            keys = {"weights": called, "attention": attention, "base": base, "batch": batch, "tokens": length}
            yield Cell(
                f"training {shape} {'' if called == 'float' else called + ' '}{attention} batch {batch} tokens {length}",
                {"part": "training", "shape": shape, "dtype": bench.dtype, **keys},
                partial(
                    measure_training, bench, shape, attention, batch, length, sizes.rounds, weights=weights, base=base,
                    as_page=sizes.as_page and base == "trained",
                ),
            )  # fmt: skip


def inference_cells(bench: "Bench", shape: str, sizes: Sizes, grid: list[tuple[int, int]]) -> Iterator[Cell]:
    from gpu_measure import measure_inference

    for weights, attention in SIDES:
        for batch, prompt in grid:
            for loop in LOOPS:
                if attention == "flash_attention_2" and loop == "recorded":
                    continue
                keys = {"weights": weights, "attention": attention, "loop": loop, "batch": batch, "tokens": prompt}
                what = (shape, weights, attention, loop, batch, prompt)
                yield Cell(
                    f"inference {shape} {weights} {attention} {loop} batch {batch} tokens {prompt}",
                    {"part": "inference", "shape": shape, "dtype": bench.dtype, **keys},
                    partial(measure_inference, bench, *what, sizes.new, sizes.rounds),
                )


def table_cells(bench: "Bench", parts: list[str], shapes: list[str]) -> Iterator[Cell]:
    """Smallest and largest sizes of all shapes, then what lies between them."""
    for which in range(2):
        for shape in shapes:
            sizes = TABLES[shape]
            if "inference" in parts:
                yield from inference_cells(bench, shape, sizes, corners_first(sizes.batches, sizes.prompts)[which])
            if "training" in parts:
                yield from training_cells(bench, shape, sizes, corners_first(sizes.batches, sizes.lengths)[which])


# The command ----------------------------------------------------------------------------------------------------------


def all_cells(bench: "Bench", part: str, shapes: list[str]) -> Iterator[Cell]:
    """What matters most comes first."""
    from gpu_goals import TINY_GOALS, GoalSizes, goal_cells

    if part in ("goals", "all"):
        yield from goal_cells(bench, TINY_GOALS if shapes == ["tiny"] else GoalSizes())
    yield from table_cells(bench, [one for one in ("inference", "training") if part in (one, "all")], shapes)


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
        full_page,
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
