"""The CPU kernels one by one: checked against float64, then timed, beside the memory's own speed and the arithmetic's.

    python evals/kernel_speed.py [--threads 2] [--shape 2048x8192] [--out evals/results]

Each case multiplies T tokens with many layers of one shape in turn, together far larger than any cache, as a model does. Before and
after each repeat the same memory is read by nothing but wide loads (`qlm_read_bandwidth`): the ceiling of one token. "GOP/s" are two
operations for each weight and token. Figures are medians over the repeats. The last line printed is JSON.
"""

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shared import cpu_name, slug, use_checkout, versions, write_json

use_checkout()

from qlm.kernels import cpu  # noqa: E402

# Of all layers of a case together.
BYTES = 600 << 20
TOKENS = (1, 8, 128, 512)
# Where a check must land: int8 is exact but for the last rounding; the others round activations to int8, in parts.
TOLERANCE = {"float16": 1e-5, "int8": 0.02, "nf4": 0.02, "gptq-2": 0.02, "gptq-3": 0.02, "gptq-4": 0.02, "gptq-8": 0.02}
GROUP = 128
NF4_LEVELS = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip


def address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


class Layers:
    """`count` layers of one format: one buffer of random bits for their weights, everything else shared."""

    def __init__(self, kind: str, in_features: int, out_features: int) -> None:
        self.kind, self.shape = kind, (out_features, in_features)
        self.bits = {"float16": 16, "int8": 8, "nf4": 4}.get(kind) or int(kind[-1])
        self.layer_bytes = in_features * out_features * self.bits // 8
        self.count = max(1, BYTES // self.layer_bytes)
        rng = np.random.default_rng(0)
        self.weights = rng.integers(0, 256, (self.count, self.layer_bytes), dtype=np.uint8)
        self.side = dict(in_features=in_features, out_features=out_features)
        self.keep: list[NDArray[Any]] = []
        if kind == "float16":
            # Any bits but those of infinities, NaN and huge numbers.
            self.weights.view(np.uint16)[:] = self.weights.view(np.uint16) & 0x83FF | 0x2000
            self.side |= dict(format=cpu.FLOAT, weight_dtype=cpu.F16)
        elif kind == "int8":
            self.keep = [np.full(out_features, 0.01, np.float32)]
            self.side |= dict(format=cpu.INT8, scale=address(self.keep[0]))
        elif kind == "nf4":
            self.keep = [np.full(out_features * in_features // 64, 0.02, np.float32)]
            self.side |= dict(format=cpu.NF4, block=64, scale=address(self.keep[0]))
        else:
            groups = in_features // GROUP
            zero = np.full((groups, out_features), 2 ** (self.bits - 1), np.uint8)
            self.keep = [np.full((groups, out_features), 0.01, np.float16), zero]
            self.side |= dict(
                format=cpu.GPTQ, bits=self.bits, group_size=GROUP, scale_dtype=cpu.F16,
                scale=address(self.keep[0]), zero_point=address(zero),
            )  # fmt: skip
        self.linears = [self._linear(i) for i in range(self.count)]

    def _linear(self, i: int) -> cpu.Linear:
        linear = cpu.Linear(weight=address(self.weights[i]), **self.side)
        if self.kind == "int8":
            sums = self.weights[i].view(np.int8).reshape(self.shape).sum(1, dtype=np.int32)
            self.keep.append(sums)
            linear.row_sum = address(sums)
        return linear

    def weight(self, rows: int) -> NDArray[np.float64]:
        """The first `rows` out features of the first layer, by plain arithmetic on the file's bits."""
        width, packed = self.shape[1], self.weights[0]
        if self.kind == "float16":
            return packed.view(np.float16).reshape(self.shape)[:rows].astype(np.float64)
        if self.kind == "int8":
            return packed.view(np.int8).reshape(self.shape)[:rows] * 0.01
        if self.kind == "nf4":
            both = packed.reshape(self.shape[0], width // 2)[:rows]
            return NF4_LEVELS[np.stack([both >> 4, both & 15], -1).reshape(rows, width)] * 0.02
        words = packed.view(np.uint32).reshape(-1, self.shape[0])[:, :rows].astype(np.uint64)
        stream = np.unpackbits(words.astype("<u4").T.copy().view(np.uint8).reshape(rows, -1), axis=1, bitorder="little")
        codes = stream.reshape(rows, width, self.bits) @ (1 << np.arange(self.bits))
        return (codes - 2.0 ** (self.bits - 1)) * np.float64(np.float16(0.01))


def forward(team: cpu.Team, linear: cpu.Linear, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
    cpu.library().qlm_linear_forward(
        team.handle, ctypes.byref(linear), len(x), address(x), x.shape[1], address(y), y.shape[1]
    )


def check(team: cpu.Team, layers: Layers, x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Relative error (Frobenius) of some out features; stops the program where it is too large."""
    rows = min(64, layers.shape[0])
    forward(team, layers.linears[0], x, y)
    exact = x.astype(np.float64) @ layers.weight(rows).T
    error = float(np.linalg.norm(y[:, :rows] - exact) / np.linalg.norm(exact))
    if not error < TOLERANCE[layers.kind]:
        raise SystemExit(
            f"{layers.kind}, {len(x)} tokens: relative error {error:.3g}, at most {TOLERANCE[layers.kind]}"
        )
    return error


def ceiling(team: cpu.Team, layers: Layers) -> float:
    found = ctypes.c_double()
    cpu.library().qlm_read_bandwidth(team.handle, address(layers.weights), layers.weights.nbytes, ctypes.byref(found))
    return found.value


def measure(team: cpu.Team, kind: str, in_features: int, out_features: int, repeats: int) -> list[dict[str, Any]]:
    layers = Layers(kind, in_features, out_features)
    rows = []
    for tokens in TOKENS:
        x = np.random.default_rng(1).standard_normal((tokens, in_features)).astype(np.float32)
        y = np.empty((tokens, out_features), np.float32)
        error = check(team, layers, x, y)
        some = layers.linears[: max(1, min(layers.count, 2048 // tokens))]
        seconds, readings = [], []
        for _ in range(repeats):
            before = ceiling(team, layers)
            start = time.perf_counter()
            for linear in some:
                forward(team, linear, x, y)
            seconds.append((time.perf_counter() - start) / len(some))
            readings.append((before + ceiling(team, layers)) / 2)
        gb_per_s = [layers.layer_bytes / s / 1e9 for s in seconds]
        shares = [reached / ceil for reached, ceil in zip(gb_per_s, readings, strict=True)]
        median = statistics.median(seconds)
        rows.append({
            "format": kind, "in_features": in_features, "out_features": out_features, "tokens": tokens,
            "ms": median * 1e3, "weight_gb_per_s": statistics.median(gb_per_s),
            "ceiling_gb_per_s": statistics.median(readings), "ceiling_share": statistics.median(shares),
            "gop_per_s": 2e-9 * in_features * out_features * tokens / median, "relative_error": error,
        })  # fmt: skip
        r = rows[-1]
        print(
            f"{kind:8} {in_features:5} x {out_features:5} {tokens:4} tokens {r['ms']:8.3f} ms {r['weight_gb_per_s']:6.1f} of "
            f"{r['ceiling_gb_per_s']:5.1f} GB/s ({r['ceiling_share']:.2f}) {r['gop_per_s']:7.0f} GOP/s  error {error:.1e}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="all CPUs of this process by default")
    parser.add_argument(
        "--shape", action="append", metavar="IxO", help="in and out features; may be given several times"
    )
    parser.add_argument("--format", action="append", choices=list(TOLERANCE), help="all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for a JSON file")
    arguments = parser.parse_args()
    shapes = [tuple(int(n) for n in text.split("x")) for text in arguments.shape or ["2048x8192", "768x3072"]]
    rows = []
    with cpu.Team(arguments.threads) as team:
        for in_features, out_features in shapes:
            for kind in arguments.format or list(TOLERANCE):
                rows += measure(team, kind, in_features, out_features, arguments.repeats)
        result = {
            "cpu": cpu_name(), "isa": cpu.library().isa, "threads": team.threads, "repeats": arguments.repeats,
            "versions": versions(), "rows": rows,
        }  # fmt: skip
    if arguments.out:
        write_json(arguments.out / f"kernel_speed-{slug(cpu_name())}.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
