"""The way from torch tensors to the GPU's kernels, under Triton's interpreter: which kernel is chosen, shapes, gradients, what is kept of a
layer; and what is said where there are none.

Functions named `check_...` run in the process that interprets (`interpreted.py`).
"""

import gc
import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qlm.errors import Unavailable, UsageError
from qlm.kernels import cuda_ops, ops
from qlm.kernels.cuda_ops import DENSE_ROWS, FUSED_ROWS, MATVEC_ROWS, Gpu
from tests.kernels.test_cuda_gptq import DTYPES, TOLERANCE, File, file, kept, random, rounded

TURING, AMPERE = Gpu((7, 5), 4), Gpu((8, 0), 4)


# GPTQ -----------------------------------------------------------------------------------------------------------------


def product(layer: File, x: Tensor, bias: Tensor | None, gpu: Gpu) -> Tensor:
    y = cuda_ops.gptq_product(x, *layer[:4], bias, layer.bits, layer.v2, ops._zero_points, gpu)
    assert y is not None
    return y


def check_rows(groups: str, turing: bool) -> None:
    """However many rows: the kernel that is chosen for them, with bias, at a GPU with and one without tensor cores for Triton."""
    layer = file(4, groups)
    for dtype in DTYPES[1 if turing else 0 :]:
        # Beside tensor cores every count; without, those around the limit, which cost the interpreter seconds.
        for rows in (1, MATVEC_ROWS + 1) if turing or dtype == torch.float32 else (1, 3, 16, 17, 64, FUSED_ROWS + 1):
            x, bias = random(rows, 256, dtype=dtype), random(96, dtype=dtype, seed=1)
            weight = layer.weight if rows <= 4 else rounded(layer.weight, dtype).double()
            y = product(layer, x, bias, TURING if turing else AMPERE)
            # torch's own product of a few rows in 16 bits on CPUs is one more rounding off.
            error = (y.double() - (x.double() @ weight + bias.double())).abs().max() / y.double().abs().max()
            assert error < 2 * TOLERANCE[dtype], (dtype, rows, error)


@pytest.mark.parametrize("turing", [False, True], ids=["sm_80", "sm_75"])
@pytest.mark.parametrize("groups", ["128", "act"])
def test_rows(groups: str, turing: bool, interpreted: Callable[..., Any]) -> None:
    interpreted(check_rows, groups, turing)


def check_every_way(groups: str) -> None:
    """The ways that a GPU may choose from, for more rows than a tile has: from unpacking in the kernel to a product with the whole weight."""
    from qlm.kernels.cuda import tune

    layer, counts = file(4, groups), []
    x, bias = random(DENSE_ROWS + 1, 256, dtype=torch.float16), random(96, dtype=torch.float16, seed=1)
    expected = x.double() @ rounded(layer.weight, torch.float16).double() + bias.double()
    for way in range(4):

        def chosen(
            key: Any, variant: Any, count: int, launch: Callable[[int], Tensor], device: Any, way: int = way
        ) -> Tensor:
            counts.append(count)
            return launch(way if count > 1 else 0)

        with mock.patch.object(tune, "run", chosen):
            y = product(layer, x, bias, AMPERE)
        assert (y.double() - expected).abs().max() / expected.abs().max() < 2 * TOLERANCE[torch.float16], way
    # The last one asks for the weight, for which there is one way.
    assert counts == [4, 4, 4, 4, 1]


@pytest.mark.parametrize("groups", ["128", "act"])
def test_every_way(groups: str, interpreted: Callable[..., Any]) -> None:
    interpreted(check_every_way, groups)


def check_shapes_of_x() -> None:
    layer = file(4, "act")
    x = random(2, 256, dtype=torch.float16)
    expected = product(layer, x, None, AMPERE)
    for leading in ((2,), (1, 2), (2, 1, 1)):
        assert torch.equal(product(layer, x.view(*leading, 256), None, AMPERE), expected.view(*leading, 96)), leading
    wide = random(2, 512, dtype=torch.float16)
    wide[:, 1::2] = x
    assert torch.equal(product(layer, wide[:, 1::2], None, AMPERE), expected)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(2, 256)  # not at a multiple of 16 bytes
    assert torch.equal(product(layer._replace(g_idx=layer.g_idx.long()), shifted, None, AMPERE), expected)
    assert torch.equal(product(layer, x[0], None, AMPERE), product(layer, x[:1], None, AMPERE)[0])
    for empty in ((0,), (4, 0)):
        assert product(layer, x.new_zeros(*empty, 256), None, AMPERE).shape == (*empty, 96)


def test_shapes_of_x(interpreted: Callable[..., Any]) -> None:
    interpreted(check_shapes_of_x)


def check_not_finite() -> None:
    layer = file(4, "128")
    x = random(20, 256, dtype=torch.float16)
    x[1, 5], x[2, 7], x[3, 9] = float("nan"), float("inf"), -float("inf")
    for rows in (4, 20):
        y = product(layer, x[:rows], None, AMPERE)
        reference = ops.gptq_linear_reference(x[:rows], *layer[:4], None, 4, False)
        assert torch.equal(y.isfinite(), reference.isfinite())
        assert y.isfinite().all(dim=1).tolist() == [row not in (1, 2, 3) for row in range(rows)]
        assert y[1].isnan().all()


def test_not_finite(interpreted: Callable[..., Any]) -> None:
    interpreted(check_not_finite)


def check_backward(groups: str) -> None:
    """The gradient's weight comes from the kernel: it has the interpreter's bfloat16."""
    layer = file(3, groups)
    for dtype in DTYPES:
        x = random(2, 5, 256, dtype=dtype).requires_grad_()
        y = ops.gptq_linear_reference(x.detach(), *layer[:4], None, 3, False)
        upstream = random(*y.shape, dtype=dtype, seed=3)
        with (
            mock.patch.object(cuda_ops, "_gpu_of", return_value=AMPERE),
            mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        ):
            ops.gptq_linear(x, *layer[:4], bits=3, v2=False).backward(upstream)
        expected = upstream @ rounded(layer.weight, dtype).t()
        assert x.grad is not None
        assert torch.equal(x.grad, expected), dtype


@pytest.mark.parametrize("groups", ["128", "act"])
def test_backward(groups: str, interpreted: Callable[..., Any]) -> None:
    interpreted(check_backward, groups)


# What is kept of a layer ----------------------------------------------------------------------------------------------


def check_kept() -> None:
    in_order, scattered, irregular = file(4, "32"), file(4, "act"), file(4, "irregular")
    assert (kept(in_order).group_size, kept(in_order).words) == (32, None)
    assert (kept(irregular).group_size, kept(irregular).words) == (0, None)
    made = kept(scattered)
    assert made.group_size == 32
    assert made.words is not None
    assert made.words.shape == scattered.qweight.shape
    assert kept(scattered) is made
    # A last group that is shorter, as where the group size does not divide the in features.
    assert kept(file(4, "48")).group_size == 48

    scattered.qweight.add_(1)
    changed = kept(scattered)
    assert changed is not made
    assert not torch.equal(changed.words, made.words)  # type: ignore[arg-type]
    other = scattered._replace(g_idx=scattered.g_idx.clone())
    assert kept(other) is not changed
    assert kept(other._replace(v2=True)).zero_point.sum() != kept(other).zero_point.sum()  # type: ignore[union-attr]
    assert cuda_ops.gptq_product(
        random(1, 256), *other[:3], other.g_idx + 1, None, 4, False, ops._zero_points, AMPERE
    ) is None  # fmt: skip

    words = weakref.ref(kept(other).words)
    del made, changed, scattered, other
    gc.collect()
    assert words() is None


def test_what_is_kept_of_a_layer(interpreted: Callable[..., Any]) -> None:
    interpreted(check_kept)


# Where there are none -------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that says it has a GPU; kernels must not be launched on it."""
    monkeypatch.delenv("QLM_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    properties = mock.Mock(major=7, minor=5, multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for cached in (cuda_ops.why_not, cuda_ops._gpu):
        monkeypatch.setattr(cuda_ops, cached.__name__, cached.__wrapped__)
    return monkeypatch


def test_a_gpu_that_is_too_old(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    gpu.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    with pytest.raises(Unavailable) as raised:
        cuda_ops._gpu(0)
    assert str(raised.value).startswith(
        "Tesla V100 has compute capability 7.0; qlm's GPU kernels need 7.5 (T4) or newer: "
    )
    assert "\n" not in str(raised.value)
    assert ops.kernel("int8_linear", "cuda") == f"none: {raised.value}"
    gpu.setenv("QLM_KERNELS", "reference")
    assert cuda_ops._gpu(0) is None


def test_without_triton(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(importlib.util, "find_spec", lambda name: None)
    assert cuda_ops._gpu(0) is None
    assert ops.kernel("gptq_linear", "cuda") == (
        "torch reference: dequantize, then multiply (no GPU kernels: Triton is not installed)"
    )
    assert ops.kernel("int8_linear", "cuda") == (
        "torch._int_mm, exact in int32 (no GPU kernels: Triton is not installed)"
    )
    assert ops.kernel("nf4_linear", "cuda", otherwise="bitsandbytes") == "bitsandbytes"
    gpu.setenv("QLM_KERNELS", "native")
    with pytest.raises(Unavailable, match="no GPU kernels, since Triton is not installed"):
        cuda_ops._gpu(0)


def test_where_nothing_can_be_launched(gpu: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    gpu.setattr(importlib.util, "find_spec", lambda name: object())
    gpu.setattr(torch.cuda, "device", lambda index: nullcontext())
    gpu.setattr(cuda_ops, "kernels", broken)
    assert cuda_ops.why_not(0) == "Triton cannot launch a kernel: Failed to find C compiler."
    assert cuda_ops._gpu(0) is None


def test_first_call_while_a_graph_is_captured(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(importlib.util, "find_spec", lambda name: object())
    gpu.setattr(torch.cuda, "is_available", lambda: True)
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer = file(4, "32")
    for call in (lambda: cuda_ops._gpu(0), lambda: kept(layer)):
        with pytest.raises(Unavailable, match="call the model once before capturing it"):
            call()


def test_switched_off_and_misspelt(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(cuda_ops, "_missing", lambda index: "")
    assert cuda_ops._gpu(0) == Gpu((7, 5), 40)
    gpu.setenv("QLM_KERNELS", "reference")
    assert cuda_ops._gpu(0) is None
    assert ops.kernel("gptq_linear", "cuda").endswith("(no GPU kernels: QLM_KERNELS=reference)")
    gpu.setenv("QLM_KERNELS", "fast")
    with pytest.raises(UsageError, match="QLM_KERNELS=fast: expected 'native' or 'reference'"):
        cuda_ops._gpu(0)


def test_other_devices_are_not_taken() -> None:
    layer, x = file(4, "32"), random(2, 256)
    assert cuda_ops.gptq_linear(x, *layer[:4], None, 4, False, ops._zero_points) is None
    assert cuda_ops.gptq_weight(*layer[:6], torch.float32, ops._zero_points) is None
    codes = torch.zeros(8, 256, dtype=torch.int8)
    assert cuda_ops.int8_linear(x, codes, torch.ones(8, 1), torch.zeros(8, dtype=torch.int32), None, False) is None
    assert cuda_ops.int8_weight(codes, torch.ones(8, 1), torch.float32) is None


def test_the_ops_have_cuda_kernels_of_their_own() -> None:
    for name in ("int8_linear", "gptq_linear"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qlm::{name}", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("qlm::nf4_linear", "CUDA")


def test_triton_is_not_imported_without_a_gpu() -> None:
    code = (
        "import sys, torch; from qlm.kernels import ops; w = torch.ones(8, 8, dtype=torch.int8)\n"
        "ops.int8_linear(torch.ones(2, 8, requires_grad=True), w, torch.ones(8, 1), ops.int8_row_sum(w)).sum().backward()\n"
        "assert 'triton' not in sys.modules and 'qlm.kernels.cuda.int8' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr


# Choosing -------------------------------------------------------------------------------------------------------------


def check_choice() -> None:
    from triton.runtime.errors import OutOfResources

    from qlm.kernels.cuda import tune

    made: list[int] = []

    def launch(i: int) -> Tensor:
        made.append(i)
        return torch.tensor(i)

    gpu, timed, capturing = torch.device("cuda", 0), mock.Mock(return_value=2), mock.Mock(return_value=False)
    with (
        mock.patch.object(tune, "_fastest", timed),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", capturing),
    ):
        assert tune.run("a", 1, 3, launch, torch.device("cpu")) == 0
        assert tune.run("one", 1, 1, launch, gpu) == 0
        assert timed.call_count == 0
        assert [int(tune.run("a", rows, 3, launch, gpu)) for rows in (1, 1, 2)] == [2, 2, 2]
        assert timed.call_count == 1
        tune.run("b", 1, 3, launch, gpu)
        tune.run("a", 1, 3, launch, torch.device("cuda", 1))
        assert timed.call_count == 3
        torch.use_deterministic_algorithms(True)
        assert tune.run("c", 1, 3, launch, gpu) == 0

        # Only what has run is launched while a graph is captured, with the very variant of the very kernel.
        capturing.return_value = True
        assert tune.run("c", 1, 3, launch, gpu) == 0
        torch.use_deterministic_algorithms(False)
        assert [int(tune.run("a", rows, 3, launch, gpu)) for rows in (1, 2)] == [2, 2]
        assert tune.run("one", 1, 1, launch, gpu) == 0
        before, other = len(made), torch.device("cuda", 1)
        for deterministic, key, variant, count, device in (
            (True, "a", 1, 3, gpu), (True, "c", 2, 3, gpu), (False, "a", 3, 3, gpu), (False, "c", 1, 3, gpu),
            (False, "one", 2, 1, gpu), (False, "b", 1, 3, other),
        ):  # fmt: skip
            torch.use_deterministic_algorithms(deterministic)
            with pytest.raises(Unavailable, match="call the model once with it before capturing"):
                tune.run(key, variant, count, launch, device)
        assert len(made) == before
        assert timed.call_count == 3
        torch.use_deterministic_algorithms(False)

    # The second is the fastest, once the clock has sped up; the third is too large.
    clock = [0.0]
    launched: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    def timed_launch(i: int) -> Tensor:
        if i == 2:
            raise OutOfResources(100_000, 65_536, "shared memory")
        launched.append(i)
        clock[0] += (5.0, 1.0)[i] if len(launched) > 6 else (5.0, 100.0)[i]
        return torch.tensor(i)

    with mock.patch.object(torch.cuda, "Event", Event), mock.patch.object(tune, "_cache_bytes", return_value=16):
        assert tune._fastest(3, timed_launch, torch.device("cpu")) == 1
        assert launched == [0, 1] * (1 + tune._WARM_UP + tune._REPEATS)
    assert [tune.rows_class(rows) for rows in (1, 2, 3, 4, 5, 16, 17, 2048, 4096, 10**6)] == [
        1, 2, 4, 4, 16, 16, 64, 4096, 4096, 4096
    ]  # fmt: skip


def test_choice(interpreted: Callable[..., Any]) -> None:
    interpreted(check_choice)
