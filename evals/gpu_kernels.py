"""The GPU kernels one by one: checked against the torch reference, then timed beside torch's own product and a copy's bandwidth.

    python evals/gpu_kernels.py [--models opt-350m] [--rows 1,16] [--kinds float,gptq-4] [--out evals/results]
                                                        on a machine with a GPU; exit code 69 where there is none

Each case multiplies `rows` tokens with many layers of one shape in turn, together larger than any cache, as a model does. Up to 128 rows
the calls are captured in a CUDA graph, so that no launch from Python is timed. Times are medians of the repeats, of one call.

    kind            what is timed
    float           torch's linear
    int8, gptq-N    the op, as it is called from a model; N bits, groups of 128
    gptq-N-act      the same with groups scattered over the in features
    gptq-N-tile     the tile kernel, however many rows; float16 and bfloat16, from sm_80 on
    gptq-N-dense    the weight dequantized, then cuBLAS's product

"Bandwidth" of a case is its weights' bytes over its time, and "of a copy" divides that by what copying 1 GiB on the device
reaches, bytes read and written. No network is needed. Writes gpu_kernels-<gpu>.json (rows replace those of the same name) and .md into --out,
$OUT or evals/results after every case; `--seconds` starts none after so many, `--missing` times what the file has not. A case that fails is
a row that says so, and the next one is timed, in a fresh process (gpu_cells.py). The last line printed is JSON.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_cells import NO_GPU, Cell, Results, Resumption, add_options, results_folder, run_cells, supervised
from shared import cpu_name, driver_version, slug, use_checkout, versions
from torch import Tensor

use_checkout()

from qlm.kernels import cuda_ops, ops  # noqa: E402

# model: [out, in] of the linears of a block that differ.
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "opt-350m": {"q_proj": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)},
    "pythia-1.4b": {
        "query_key_value": (6144, 2048), "dense": (2048, 2048), "dense_h_to_4h": (8192, 2048), "dense_4h_to_h": (2048, 8192)
    },
    "pythia-6.9b": {
        "query_key_value": (12288, 4096), "dense": (4096, 4096), "dense_h_to_4h": (16384, 4096),
        "dense_4h_to_h": (4096, 16384),
    },
}  # fmt: skip
ROWS = (1, 4, 16, 128, 2048)
KINDS = ("float", "int8", "gptq-4", "gptq-4-tile", "gptq-4-dense")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
GROUP = 128
# Weights of a case together, however small one is: so many times the last-level cache, 60 MB on an H200, that none of them is still there
# when its turn comes again.
CACHES = 4
LEAST_BYTES = 64 << 20
GRAPH_ROWS = 128
COPIED = 1 << 30
# Largest difference in units of the reference's root mean square: a rounding of weight and result each. int8: the GPU's reference divides by
# a reciprocal, which moves a code here and there by one step.
TOLERANCE = {"float16": 0.01, "bfloat16": 0.06, "float32": 1e-4}
INT8_TOLERANCE = 0.06

Run = Callable[[Tensor], Tensor]


def layer(kind: str, O: int, I: int, dtype: torch.dtype, device: str, seed: int) -> tuple[Run, Run, int]:
    """(the op, the reference, bytes of the weight with its scales) of a random layer."""
    generator = torch.Generator(device).manual_seed(seed)
    if kind == "float":
        weight = torch.randn(O, I, generator=generator, device=device).mul_(0.02).to(dtype)
        return (
            lambda x: torch.nn.functional.linear(x, weight),
            lambda x: torch.nn.functional.linear(x.float(), weight.float()),
            weight.numel() * weight.element_size(),
        )
    if kind == "int8":
        codes = torch.randint(-127, 128, (O, I), dtype=torch.int8, generator=generator, device=device)
        scale = torch.rand(O, 1, generator=generator, device=device) * 1e-3 + 1e-4
        row_sum = ops.int8_row_sum(codes)
        return (
            lambda x: ops.int8_linear(x, codes, scale, row_sum),
            lambda x: ops.int8_linear_reference(x.float(), codes, scale, row_sum, None, False),
            codes.numel() + scale.numel() * 4,
        )
    bits = int(kind.split("-")[1])
    groups = I // GROUP
    # Any words are a layer. Scales are small, so that sums stay finite in float16.
    words = [
        torch.randint(-(2**31), 2**31, shape, generator=generator, device=device).to(torch.int32)
        for shape in ((I * bits // 32, O), (groups, O * bits // 32))
    ]
    scales = (torch.rand(groups, O, generator=generator, device=device) * 0.02 / 2**bits + 1e-4).to(torch.float16)
    g_idx = torch.arange(I, device=device) // GROUP
    if kind.endswith("-act"):
        g_idx = g_idx[torch.randperm(I, generator=generator, device=device)]
    tensors = (words[0], words[1], scales, g_idx.to(torch.int32))
    return (
        lambda x: ops.gptq_linear(x, *tensors, bits=bits, v2=False),
        lambda x: ops.gptq_linear_reference(x.float(), *tensors, None, bits, False),
        sum(t.numel() * t.element_size() for t in tensors[:3]),
    )


def forced(kind: str) -> ExitStack:
    """A context in which `gptq_linear` takes the kernel that the kind names."""
    stack = ExitStack()
    limits = {}
    if kind.endswith("-tile"):
        limits = {"FUSED_ROWS": 1 << 30, "DENSE_ROWS": 1 << 30, "_MATVEC_ROWS_BESIDE_TENSOR_CORES": 1, "MATVEC_ROWS": 1}
    elif kind.endswith("-dense"):
        limits = {"FUSED_ROWS": 0, "_MATVEC_ROWS_BESIDE_TENSOR_CORES": 0, "MATVEC_ROWS": 0}
    for name, limit in limits.items():
        stack.enter_context(mock.patch.object(cuda_ops, name, limit))
    return stack


def check(run: Run, reference: Run, x: Tensor, tolerance: float) -> float:
    """The largest difference from the reference, in units of its root mean square.

    Raises:
        ValueError: it is larger than it may be, or a value is not finite.
    """
    found, expected = run(x).float(), reference(x).float()
    difference = ((found - expected).abs().max() / expected.square().mean().sqrt()).item()
    if not difference <= tolerance:  # NaN too
        raise ValueError(f"differs from the reference by {difference:.3g}; {tolerance} is allowed")
    return difference


def layers_needed(size: int, cache: int) -> int:
    """How many layers of so many bytes go far beyond a cache."""
    return -(-max(CACHES * cache, LEAST_BYTES) // size)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.zeros(COPIED, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / statistics.median(seconds(lambda: target.copy_(source), 10))


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """GPU seconds of each repeat, after two that are not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for repeat in range(repeats + 2):
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return times


def timed(runs: Sequence[Run], x: Tensor, repeats: int) -> float:
    """Seconds of one call, all layers in turn."""

    def everything() -> None:
        for run in runs:
            run(x)

    everything()  # compiles, chooses configurations, prepares layers
    torch.cuda.synchronize()
    if x.shape[0] > GRAPH_ROWS:
        return statistics.median(seconds(everything, repeats)) / len(runs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        everything()
    return statistics.median(seconds(graph.replay, repeats)) / len(runs)


def case(model: str, name: str, kind: str, rows: int, dtype: str, repeats: int, bandwidth: float) -> dict[str, Any]:
    """The figures of one row of the report."""
    O, I = MODELS[model][name]
    chosen = configurations()
    x = torch.randn(rows, I, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(DTYPES[dtype])
    first, reference, size = layer(kind, O, I, DTYPES[dtype], "cuda", 0)
    with torch.no_grad(), forced(kind):
        found = check(first, reference, x, INT8_TOLERANCE if kind == "int8" else TOLERANCE[dtype])
        count = layers_needed(size, torch.cuda.get_device_properties(0).L2_cache_size)
        runs = [first, *(layer(kind, O, I, DTYPES[dtype], "cuda", seed)[0] for seed in range(1, count))]
        took = timed(runs, x, repeats)
    return {
        "difference": found, "layers": count, "us": took * 1e6, "weight_gb_per_s": size / took / 1e9, "of_a_copy": size / took / bandwidth,
        "tflops": 2 * rows * O * I / took / 1e12,
        "chosen": {key: index for key, index in configurations().items() if key not in chosen},
    }  # fmt: skip


def configurations() -> dict[str, int]:
    """Which configuration has been chosen for what, by this process so far."""
    if not cuda_ops.describe(torch.cuda.current_device()):
        return {}  # without Triton nothing is chosen
    return {str(key): index for key, index in cuda_ops.kernels("tune")._chosen.items()}


def cases(options: argparse.Namespace, capability: tuple[int, int], bandwidth: float) -> Iterator[Cell]:
    for dtype in options.dtypes:
        for model in options.models:
            for layer_name, (O, I) in MODELS[model].items():
                for rows in options.rows:
                    for kind in options.kinds:
                        if kind.endswith("-tile") and (dtype == "float32" or capability < (8, 0) or rows == 1):
                            continue
                        keys = {
                            "model": model, "layer": layer_name, "out": O, "in": I, "kind": kind, "rows": rows, "dtype": dtype
                        }  # fmt: skip
                        what = (model, layer_name, kind, rows, dtype, options.repeats, bandwidth)
                        yield Cell(f"{model} {layer_name} {dtype} rows {rows} {kind}", keys, partial(case, *what))


def over_float(rows: list[dict[str, Any]]) -> None:
    """Add to each row that has a time its time over that of torch's linear of the same shape, dtype and rows."""
    floats = {
        tuple(r[k] for k in ("model", "layer", "rows", "dtype")): r.get("us") for r in rows if r["kind"] == "float"
    }
    for row in rows:
        us = floats.get(tuple(row[k] for k in ("model", "layer", "rows", "dtype")))
        row["over_float"] = row["us"] / us if us and "us" in row else None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; what failed has its reason in the place of figures."""
    lines = [
        "| model | layer | out x in | dtype | rows | kind | us | over float | weights, GB/s | of a copy | TFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = "" if row.get("over_float") is None else f"{row['over_float']:.2f}"
        figures = (
            f"{row['us']:.1f} | {ratio} | {row['weight_gb_per_s']:.0f} | {row['of_a_copy']:.2f} | {row['tflops']:.1f}"
            if "us" in row
            else f"{row.get('error') or row['not_run']} | | | |"
        )
        lines.append(
            f"| {row['model']} | {row['layer']} | {row['out']} x {row['in']} | {row['dtype']} | {row['rows']} | {row['kind']} "
            f"| {figures} |"
        )
    return "\n".join(lines) + "\n"


def page(report: dict[str, Any]) -> str:
    """Of the report's value, as Markdown; the rows get their `over_float`."""
    over_float(report["rows"])
    heads = []
    for index in sorted({row["run"] for row in report["rows"]}):
        machine = report["runs"][index]["machine"]
        heads.append(
            f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}, a copy {machine['copy_gb_per_s']:.0f} GB/s; "
            f"gptq_linear: {machine['gptq_linear']}; int8_linear: {machine['int8_linear']}."
        )
    left_out = f"\nLeft out, the time being over: {len(report['left_out'])} cases.\n" if report["left_out"] else ""
    return "\n".join(heads) + "\n\n" + table(report["rows"]) + left_out


def say(row: dict[str, Any]) -> None:
    print(table([row]).splitlines()[-1], flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="tokens that are multiplied at once")
    parser.add_argument("--kinds", default=",".join(KINDS), help="see above; N is 2, 3, 4 or 8")
    parser.add_argument("--dtypes", default="float16,bfloat16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--missing", action="store_true", help="only cases that the file has no figures for")
    parser.add_argument("--out", type=Path, help="folder; $OUT or evals/results by default")
    add_options(parser)
    options = parser.parse_args(arguments)
    options.models, options.kinds, options.dtypes = (
        text.split(",") for text in (options.models, options.kinds, options.dtypes)
    )
    for given, known in ((options.models, MODELS), (options.dtypes, DTYPES)):
        for name in given:
            if name not in known:
                parser.error(f"{name}: expected one of {', '.join(known)}")
    for kind in options.kinds:
        parts = kind.split("-")
        gptq = (
            parts[0] == "gptq"
            and len(parts) in (2, 3)
            and parts[1] in "2348"
            and parts[2:] in ([], ["act"], ["tile"], ["dense"])
        )
        if kind not in ("float", "int8") and not gptq:
            parser.error(f"{kind}: expected float, int8, or gptq-N with or without -act, -tile, -dense")
    try:
        options.rows = [int(rows) for rows in options.rows.split(",")]
    except ValueError:
        parser.error(f"--rows {options.rows}: expected numbers with commas between")
    options.out = results_folder(options.out)
    return options


def main() -> int:
    options = parse()
    if options.progress is None:
        # This process has no GPU to lose.
        return supervised(__file__, options.seconds)
    if not torch.cuda.is_available():
        print("gpu_kernels: torch sees no CUDA GPU here; nothing was timed", file=sys.stderr)
        return NO_GPU
    torch.backends.cuda.matmul.allow_tf32 = False
    resumption = Resumption.of(options)
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    machine = {
        "gpu": name, "capability": list(capability), "driver": driver_version(), "cuda": torch.version.cuda, "cpu": cpu_name(),
        "copy_gb_per_s": bandwidth_kept(resumption.progress) / 1e9,
        **{op: ops.kernel(op, "cuda") for op in ("gptq_linear", "int8_linear")},
    }  # fmt: skip
    bandwidth = machine["copy_gb_per_s"] * 1e9
    print(f"{name}, sm_{capability[0]}{capability[1]}; a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    run = {"machine": machine, "versions": versions(), "repeats": options.repeats}
    results = Results(options.out / f"gpu_kernels-{slug(name)}.json", run, page)
    cells = list(cases(options, capability, bandwidth))
    if options.missing:
        cells = results.missing(cells, options.after)
    again = run_cells(cells, results, resumption, device="cuda", until=float(options.until), say=say)
    if again is not None:
        return again
    rows, left_out = results.of_last_call(cells)
    summary = {
        "gpu": name, "cases": len(rows), "failed": [row["name"] for row in rows if row["ok"] is False],
        "left_out": len(left_out),
    }  # fmt: skip
    print(f"written: {results.path} and .md")
    print(json.dumps(summary))
    resumption.over()
    return 1 if summary["failed"] else 0


def bandwidth_kept(progress: Path) -> float:
    """A copy's bytes per second, measured by the first process: its successors' rows belong to the same run."""
    file = progress.with_name("copy.json")
    if not file.exists():
        file.write_text(json.dumps(copy_bandwidth()), "utf-8")
    return float(json.loads(file.read_text("utf-8")))


if __name__ == "__main__":
    sys.exit(main())
