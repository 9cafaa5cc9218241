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
reaches, bytes read and written. No network is needed. Writes gpu_kernels-<gpu>.json and .md into --out, $OUT or evals/results;
the last line printed is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from shared import ROOT, cpu_name, driver_version, slug, use_checkout, versions, write_json
from torch import Tensor

use_checkout()

from qlm.kernels import cuda_ops, ops  # noqa: E402

NO_GPU = 69
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
# Weights of a case together: beyond the last-level cache of any GPU.
BYTES = 400 << 20
MOST_LAYERS = 64
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
        limits = {"FUSED_ROWS": 1 << 30, "_MATVEC_ROWS_BESIDE_TENSOR_CORES": 1, "MATVEC_ROWS": 1}
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
    """One row of the report."""
    O, I = MODELS[model][name]
    row: dict[str, Any] = {"model": model, "layer": name, "out": O, "in": I, "kind": kind, "rows": rows, "dtype": dtype}
    x = torch.randn(rows, I, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(DTYPES[dtype])
    first, reference, size = layer(kind, O, I, DTYPES[dtype], "cuda", 0)
    with torch.no_grad(), forced(kind):
        row["difference"] = check(first, reference, x, INT8_TOLERANCE if kind == "int8" else TOLERANCE[dtype])
        count = max(1, min(MOST_LAYERS, BYTES // size))
        runs = [first, *(layer(kind, O, I, DTYPES[dtype], "cuda", seed)[0] for seed in range(1, count))]
        took = timed(runs, x, repeats)
    return {
        **row, "layers": count, "us": took * 1e6, "weight_gb_per_s": size / took / 1e9, "of_a_copy": size / took / bandwidth,
        "tflops": 2 * rows * O * I / took / 1e12,
    }  # fmt: skip


def over_float(rows: list[dict[str, Any]]) -> None:
    """Add to each row its time over that of torch's linear of the same shape, dtype and rows."""
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
            else f"{row['error']} | | | |"
        )
        lines.append(
            f"| {row['model']} | {row['layer']} | {row['out']} x {row['in']} | {row['dtype']} | {row['rows']} | {row['kind']} "
            f"| {figures} |"
        )
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="tokens that are multiplied at once")
    parser.add_argument("--kinds", default=",".join(KINDS), help="see above; N is 2, 3, 4 or 8")
    parser.add_argument("--dtypes", default="float16,bfloat16", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="folder; $OUT or evals/results by default")
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
    options.out = options.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "evals" / "results")
    return options


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        print("gpu_kernels: torch sees no CUDA GPU here; nothing was timed", file=sys.stderr)
        return NO_GPU
    torch.backends.cuda.matmul.allow_tf32 = False
    begun = time.perf_counter()
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    bandwidth = copy_bandwidth()
    print(f"{name}, sm_{capability[0]}{capability[1]}; a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    rows: list[dict[str, Any]] = []
    stem = options.out / f"gpu_kernels-{slug(name)}"

    def save() -> None:
        over_float(rows)
        described = {op: ops.kernel(op, "cuda") for op in ("gptq_linear", "int8_linear")}
        computes = cuda_ops.describe(torch.cuda.current_device())
        chosen = {str(key): index for key, index in cuda_ops.kernels("tune")._chosen.items()} if computes else {}
        machine = {
            "gpu": name, "capability": list(capability), "driver": driver_version(), "cuda": torch.version.cuda, "cpu": cpu_name(),
            "copy_gb_per_s": bandwidth / 1e9, **described,
        }  # fmt: skip
        report = {
            "machine": machine,
            "versions": versions(),
            "repeats": options.repeats,
            "chosen": chosen,
            "cases": rows,
        }
        write_json(stem.with_suffix(".json"), report)
        stem.with_suffix(".md").write_text(table(rows), "utf-8")

    # What is there already is written after each linear: a machine that is lent may be taken back.
    for dtype in options.dtypes:
        for model in options.models:
            for linear, (O, I) in MODELS[model].items():
                for count in options.rows:
                    for kind in options.kinds:
                        if kind.endswith("-tile") and (dtype == "float32" or capability < (8, 0) or count == 1):
                            continue
                        try:
                            row = case(model, linear, kind, count, dtype, options.repeats, bandwidth)
                        except (
                            Exception
                        ) as error:  # whatever a kernel throws is a row of its own; the others are still timed
                            text = (str(error).strip().splitlines() or [""])[0]
                            row = {
                                "model": model, "layer": linear, "out": O, "in": I, "kind": kind, "rows": count, "dtype": dtype,
                                "error": f"{type(error).__name__}: {text}",
                            }  # fmt: skip
                        rows.append(row)
                        print(table([row]).splitlines()[-1], flush=True)
                        torch.cuda.empty_cache()
                save()
    failed = sum("error" in row for row in rows)
    summary = {"gpu": name, "cases": len(rows), "failed": failed, "seconds": round(time.perf_counter() - begun, 1)}
    print(f"written: {stem}.json and .md")
    print(json.dumps(summary))
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
