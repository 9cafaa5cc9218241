"""evals/gpu_kernels.py as far as it needs no GPU: what it refuses, its layers and their check on the CPU, its table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EVALS = Path(__file__).resolve().parents[2] / "evals"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=EVALS, timeout=600)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    done = run("gpu_kernels.py", "--out", str(tmp_path))
    assert done.returncode == 69
    assert done.stderr == "gpu_kernels: torch sees no CUDA GPU here; nothing was timed\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--models", "opt-7b"), "opt-7b: expected one of opt-350m"),
        (("--kinds", "gptq-5"), "gptq-5: expected float, int8, or gptq-N"),
        (("--kinds", "gptq-4-fast"), "gptq-4-fast: expected"),
        (("--rows", "1;2"), "--rows 1;2: expected numbers"),
        (("--dtypes", "float8"), "float8: expected one of float16"),
    ],
)
def test_arguments(arguments: tuple[str, ...], words: str) -> None:
    done = run("gpu_kernels.py", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


PARTS = """
import pytest, torch
import gpu_kernels as g
from qlm.kernels import cuda_ops
options = g.parse(["--kinds", "float,int8,gptq-3-act,gptq-8-dense", "--rows", "1,16"])
assert (options.rows, options.models) == ([1, 16], list(g.MODELS))
with g.ops.float_activations():
    for kind in ["float", "int8", "gptq-4", "gptq-3-act", "gptq-2-tile", "gptq-8-dense"]:
        run, reference, size = g.layer(kind, 96, 256, torch.float32, "cpu", 0)
        bits = 32 if kind == "float" else 8 if kind == "int8" else int(kind[5])
        assert 0 <= size - 96 * 256 * bits // 8 < 1000, kind
        x = torch.randn(3, 256)
        assert g.check(run, reference, x, 1e-4) < 1e-4, kind
        with pytest.raises(ValueError, match="differs from the reference by"):
            g.check(lambda x: run(x) * 1.01, reference, x, 1e-4)
        with pytest.raises(ValueError, match="nan"):
            g.check(lambda x: run(x) * float("nan"), reference, x, 1e-4)
before = cuda_ops.FUSED_ROWS
with g.forced("gptq-4-tile"):
    assert cuda_ops.FUSED_ROWS > 10**9
with g.forced("gptq-4-dense"):
    assert (cuda_ops.FUSED_ROWS, cuda_ops.MATVEC_ROWS) == (0, 0)
assert before == cuda_ops.FUSED_ROWS
# A small layer of 4 bits, beside an H200's cache; one that is larger than all that; a GPU with next to no cache.
assert g.layers_needed(1 << 19, 60 << 20) * (1 << 19) == 4 * (60 << 20)
assert g.layers_needed(1 << 30, 60 << 20) == 1
assert g.layers_needed(1 << 20, 1 << 10) == 64
few = g.parse(["--models", "opt-350m", "--rows", "1,16", "--kinds", "float,gptq-4-tile"])
for capability, count in [((9, 0), 2 * 3 * (2 + 1)), ((7, 5), 2 * 3 * 2)]:
    cells = list(g.cases(few, capability, 1e12))
    assert len({cell.name for cell in cells}) == len(cells) == count
assert cells[0].keys == {"model": "opt-350m", "layer": "q_proj", "out": 1024, "in": 1024, "kind": "float", "rows": 1, "dtype": "float16"}
shape = {"model": "m", "layer": "l", "out": 4, "in": 8, "dtype": "float16", "rows": 1}
figures = {"weight_gb_per_s": 100.0, "of_a_copy": 0.5, "tflops": 1.0}
rows = [
    {**shape, "kind": "float", "us": 10.0, **figures},
    {**shape, "kind": "int8", "us": 5.0, **figures},
    {**shape, "kind": "gptq-4", "error": "ValueError: wrong"},
]
g.over_float(rows)
assert [row["over_float"] for row in rows] == [1.0, 0.5, None]
lines = g.table(rows).splitlines()
assert lines[3] == "| m | l | 4 x 8 | float16 | 1 | int8 | 5.0 | 0.50 | 100 | 0.50 | 1.0 |"
assert "ValueError: wrong" in lines[4]
assert len({line.count("|") for line in lines}) == 1
machine = {"gpu": "G", "driver": "1", "cuda": "2", "copy_gb_per_s": 4000.0, "gptq_linear": "Triton", "int8_linear": "torch"}
rows.append({**shape, "rows": 2, "kind": "float", "ok": None, "not_run": "out of memory"})
page = g.page({"runs": [{"machine": machine}], "rows": [{**row, "run": 0} for row in rows], "left_out": ["x", "y"]})
assert page.startswith("G, driver 1, CUDA 2, a copy 4000 GB/s; gptq_linear: Triton; int8_linear: torch."), page
assert "| 2 | float | out of memory |" in page
assert "| 0.50 | 100 |" in page
assert "over: 2 cases" in page
"""


def test_parts() -> None:
    done = run("-c", PARTS)
    assert done.returncode == 0, done.stderr
