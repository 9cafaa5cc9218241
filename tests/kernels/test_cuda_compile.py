"""The GPU kernels compile, as their launchers call them, for the oldest GPU and newer ones; no GPU is needed for that.

The interpreter does not see what a compiler refuses, nor what it makes of a kernel: registers that spill, shared memory that a GPU has
not got, products that miss the tensor cores.
"""

import functools
import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled under the interpreter"),
]

T4, A100, H200 = 75, 80, 90
# Shared memory of a block, bytes: the least that GPUs with this capability or a later one have (8.6 and 8.9 have 99 KiB).
SHARED = {T4: 64 << 10, A100: 99 << 10, H200: 99 << 10}
NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Recorder:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any, made: list[Launch]) -> None:
        self.kernel, self.made = kernel, made

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*positional: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
            names = [parameter.name for parameter in self.kernel.params]
            options = {"num_warps": num_warps, "num_stages": num_stages}
            self.made.append(Launch(self.kernel, {**dict(zip(names, positional, strict=False)), **named}, options))

        return launch


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(module: Any, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What `call` would launch of a module's kernels."""
    made: list[Launch] = []
    with monkeypatch.context() as patch:
        for name in KERNELS:
            if hasattr(module, name):
                patch.setattr(module, name, Recorder(getattr(module, name), made))
        call()
    assert made
    return made


KERNELS = (
    "_matvec", "_fused_matvec", "_matmul", "_add_parts", "_dequantize", "_arrange", "_quantize", "_finish", "_round", "_choose",
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Triton keeps what it compiled, and this file too; not at home."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def compiled(launch: Launch, capability: int) -> Any:
    """As Triton does at a launch, for tensors at multiples of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{NAMES[value.dtype]}"
            attributes[(number,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


@functools.cache
def tool() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def machine_code(kernel: Any, folder: Path) -> tuple[str, int]:
    """(assembly, bytes of registers that spilled)"""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    done = [subprocess.run([tool(), option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")]  # fmt: skip
    found = re.search(r"STACK:(\d+)", done[1])
    assert found is not None
    return done[0], int(found[1])


def check(launch: Launch, capability: int, folder: Path, products: str = "") -> None:
    """It compiles, fits, spills nothing worth mentioning, and multiplies with `products`."""
    kernel = compiled(launch, capability)
    assert kernel.metadata.shared <= SHARED[capability]
    code, spilled = machine_code(kernel, folder)
    assert spilled == 0
    if products:
        assert re.search(rf"\b(?:{products})", code), f"sm_{capability} multiplies with something else than {products}"


def gptq_layer(bits: int, dtype: torch.dtype, group_size: int = 128) -> Any:
    from qlm.kernels.cuda import gptq

    groups = 1024 // group_size if group_size else 8
    return gptq.Layer(
        meta(1024 * bits // 32, 2048, dtype=torch.int32), meta(groups, 2048, dtype=dtype),
        meta(groups, 2048, dtype=torch.uint8), meta(1024, dtype=torch.int32), bits, group_size,
    )  # fmt: skip


# bfloat16 on a T4, every bit width, groups that fields cross (0: only g_idx knows).
GPTQ = [
    (T4, 4, torch.float16, 128), (T4, 3, torch.bfloat16, 32), (T4, 8, torch.float32, 128),
    (A100, 2, torch.bfloat16, 128), (A100, 4, torch.float16, 0), (H200, 4, torch.float16, 128),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "bits", "dtype", "group_size"), GPTQ, ids=str)
def test_gptq(
    capability: int, bits: int, dtype: torch.dtype, group_size: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlm.kernels.cuda import gptq

    layer, x, bias = gptq_layer(bits, torch.float16, group_size), meta(64, 1024, dtype=dtype), meta(2048, dtype=dtype)

    def call() -> None:
        gptq.matvec(x[:1], layer, bias, gptq.MATVEC[0], 100)  # split: parts are added
        gptq.dequantize(layer, dtype)

    for launch in launches(gptq, call, monkeypatch):
        check(launch, capability, cache)
    if capability == T4 or dtype == torch.float32:
        return
    for rows in (16, 64) if group_size else (16,):
        for launch in launches(
            gptq, lambda rows=rows: gptq.matmul(x[:rows], layer, bias, gptq.matmul_configs(rows)[0], 1), monkeypatch
        ):
            check(launch, capability, cache, "HMMA|HGMMA")


@pytest.mark.parametrize("bits", [3, 4])
def test_arrange(bits: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlm.kernels.cuda import gptq

    words, order = meta(1024 * bits // 32, 2048, dtype=torch.int32), meta(1024, dtype=torch.int64)
    (launch,) = launches(gptq, lambda: gptq.arrange(words, order, bits), monkeypatch)
    check(launch, T4, cache)


@pytest.mark.parametrize(
    ("capability", "dtype"), [(T4, torch.bfloat16), (A100, torch.float16), (H200, torch.float16)], ids=str
)
def test_int8(capability: int, dtype: torch.dtype, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlm.kernels.cuda import int8

    x, weight = meta(128, 1024, dtype=dtype), meta(2048, 1024, dtype=torch.int8)
    scale = meta(2048, 1, dtype=torch.float32)
    layer = int8.Layer(weight, scale, meta(2048, dtype=torch.int32), meta(2048, dtype=dtype), dtype)

    def call() -> None:
        tokens = int8.quantize(x, False)
        few = int8.Tokens(*(part[:1] for part in tokens))
        int8.matvec(few, layer, int8.MATVEC[0], 100)
        int8.fused_matvec(x[:1], False, layer, int8.FUSED[0])
        int8.finish(meta(128, 2048, dtype=torch.int32), tokens, layer)
        int8.dequantize(weight, scale, dtype)

    def products() -> None:
        tokens = int8.quantize(x, True)
        for rows in (16, 128):
            some = int8.Tokens(*(part[:rows] for part in tokens))
            int8.matmul(some, layer, int8.matmul_configs(rows)[0], 1)

    for launch in launches(int8, call, monkeypatch):
        check(launch, capability, cache, "IDP" if "matvec" in launch.kernel.__name__ else "")
    if capability > T4:
        for launch in launches(int8, products, monkeypatch):
            check(launch, capability, cache, "IMMA|IGMMA" if launch.kernel.__name__ == "_matmul" else "")


@pytest.mark.parametrize("capability", [T4, H200])
def test_columns(capability: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlm.kernels.cuda import columns

    part, square, column = (meta(*shape, dtype=torch.float32) for shape in ((16, 4096), (16, 16), (16,)))
    grids, grid = meta(32, 4096, dtype=torch.float32), meta(4096, dtype=torch.float32)
    codes, groups = meta(16, 4096, dtype=torch.uint8), meta(16, dtype=torch.int64)

    def call() -> None:
        columns.round_columns(part, part, square, 1.5, column, groups, grids, grids, grids, codes)
        columns.choose_columns(part, part, part, square, column, grid, grid, grid, 0.5)

    made = launches(columns, call, monkeypatch)
    assert len(made) == 2
    for launch in made:
        check(launch, capability, cache)
