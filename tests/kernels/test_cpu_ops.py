"""From torch tensors to the CPU kernels: what takes them and what does not, the switches, what is kept and for how long."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qlm.errors import MissingInput, Unavailable, UsageError
from qlm.kernels import activations, cpu, cpu_ops, ops
from qlm.kernels.ops import float_activations
from qlm.numerics import nf4, packing
from tests.kernels.test_ops import FEW_KINDS, TOLERANCE, Layer, random, tokens_of_many_kinds

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not installed")

FOUR_BIT = [kind for kind in FEW_KINDS if not kind.startswith("int8")]
INT8 = [kind for kind in FEW_KINDS if kind.startswith("int8")]


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library, whatever QLM_KERNELS says."""
    library = cpu.library()
    monkeypatch.setattr(cpu_ops, "native", lambda: library)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry, its format, for each call of the library."""
    made: list[int] = []
    forward = cpu_ops._forward

    def spy(library: cpu.Native, linear: cpu.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        made.append(linear.format)
        return forward(library, linear, x, bias)

    monkeypatch.setattr(cpu_ops, "_forward", spy)
    return made


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each GPTQ layer that is prepared."""
    made: list[int] = []
    make = cpu_ops._make_gptq_layer

    def spy(*arguments: Any) -> Any:
        made.append(1)
        return make(*arguments)

    monkeypatch.setattr(cpu_ops, "_make_gptq_layer", spy)
    return made


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def reference(layer: Layer, x: Tensor) -> Tensor:
    return getattr(ops, f"{layer.op.__name__}_reference")(*layer.raw(x))


# Who computes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEW_KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_kernels_compute(kind: str, dtype: torch.dtype, calls: list[int]) -> None:
    layer = Layer(kind)
    with torch.no_grad():
        layer(random(3, 320, dtype=dtype))
    layer(random(3, 320, dtype=dtype).requires_grad_())
    assert calls == [{"int8": cpu.INT8, "gptq": cpu.GPTQ, "nf4-": cpu.NF4}[f"{kind}-"[:4]]] * 2


@pytest.mark.parametrize("kind", INT8)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("scale_dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bias_dtype", [None, *TOLERANCE], ids=str)
def test_int8_has_the_bits_of_the_reference(
    kind: str, dtype: torch.dtype, scale_dtype: torch.dtype, bias_dtype: torch.dtype | None, calls: list[int]
) -> None:
    layer = Layer(kind, in_features=64)
    weight, scale, row_sum = layer.tensors
    layer.tensors = (weight, scale.to(scale_dtype), row_sum)
    layer.bias = None if bias_dtype is None else random(96, seed=7, dtype=bias_dtype)
    for x in (
        tokens_of_many_kinds(),
        random(1, 1, 64),
        random(2, 3, 64, seed=3) * 1e-3,
        random(64),
        torch.zeros(0, 64),
    ):
        if dtype == torch.float16:
            x = x.clamp(-6e4, 6e4)
        assert torch.equal(layer(x.to(dtype)), reference(layer, x.to(dtype)))
    assert len(calls) == 5


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_float_activations_are_the_reference(kind: str, calls: list[int]) -> None:
    layer, x = Layer(kind), random(5, 320)
    rounded, exact = layer(x), reference(layer, x)
    assert not torch.equal(rounded, exact)
    with float_activations():
        assert torch.equal(layer(x), exact)
        with float_activations():
            assert torch.equal(layer(x), exact)
        assert torch.equal(layer(x), exact)
    with pytest.raises(ZeroDivisionError), float_activations():
        raise ZeroDivisionError
    assert torch.equal(layer(x), rounded)
    assert len(calls) == 2


def test_float_activations_are_this_threads_alone() -> None:
    layer, x = Layer("nf4"), random(5, 320)
    rounded, found = layer(x), []
    with float_activations():
        thread = threading.Thread(target=lambda: found.append(layer(x)))
        thread.start()
        thread.join()
        assert torch.equal(found[0], rounded)
        assert not torch.equal(layer(x), rounded)


def test_float_activations_are_int8s_own() -> None:
    layer, x = Layer("int8-asymmetric"), random(5, 320)
    with float_activations():
        assert torch.equal(layer(x), reference(layer, x))
        assert ops.kernel("int8_linear", "cpu").startswith("native")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("gptq-4-v1-seq", "int8 in groups of 64"),
        ("gptq-3-v2-act", "int8 in groups of 64"),
        ("nf4", "int8 in groups of 64"),
    ],
)
def test_what_is_done_with_activations_in_words(kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(kind)

    def said() -> str:
        if kind == "nf4":
            return ops.nf4_activations(*layer.tensors, in_features=320)
        return ops.gptq_activations(*layer.tensors, **layer.settings)

    assert said() == words
    with float_activations():
        assert said() == "float"
    monkeypatch.setattr(cpu_ops, "native", lambda: None)
    assert said() == "float"


@pytest.mark.parametrize(
    ("group_size", "bits", "group"),
    [
        (128, 4, 128),
        (64, 4, 64),
        (96, 3, 96),
        (768, 4, 128),
        (160, 3, 32),
        (200, 4, 40),
        (16, 2, 16),
        (1056, 3, 96),
    ],
)
def test_group_of_activations_is_the_kernels(group_size: int, bits: int, group: int) -> None:
    """By rounding: one large activation makes all others of its group vanish, and only those."""
    assert activations.gptq_group(group_size, bits) == group
    out_features = 32
    codes = torch.ones(group_size, out_features, dtype=torch.uint8)
    zeros = packing.encode_zero_points(torch.zeros(1, out_features, dtype=torch.int32), bits, "gptq_v2")
    layer = (
        packing.pack_rows(codes, bits),
        zeros,
        torch.ones(1, out_features),
        torch.zeros(group_size, dtype=torch.int32),
    )
    x = torch.full((1, group_size), 1.0)
    x[0, 0] = 1000.0
    y = ops.gptq_linear(x, *layer, bits=bits, v2=True)
    assert y[0, 0].item() == pytest.approx(1000.0 + group_size - group, rel=1e-6)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**{k: v for k, v in os.environ.items() if k != "QLM_KERNELS"}, **environment}
    return subprocess.run([sys.executable, "-c", code], env=everything, capture_output=True, text=True)


def test_environment_is_read_at_the_first_call() -> None:
    code = (
        "import os; from qlm.kernels import ops; os.environ['QLM_KERNELS'] = 'reference'; "
        "print(ops.kernel('gptq_linear', 'cpu')); del os.environ['QLM_KERNELS']; print(ops.kernel('nf4_linear', 'cpu'))"
    )
    done = run(code)
    assert done.stdout.splitlines() == ["torch reference: dequantize, then multiply"] * 2, done.stderr


@pytest.mark.parametrize(
    ("kernels", "library", "expected"),
    [
        ("reference", True, None),
        ("native", True, cpu.Native),
        ("", True, cpu.Native),
        ("", False, None),
        ("reference", False, None),
        ("native", False, Unavailable),
        ("fast", True, UsageError),
    ],
)
def test_choice_of_kernels(kernels: str, library: bool, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("QLM_KERNELS", kernels)
    if not library:
        monkeypatch.setattr(cpu, "available", lambda: False)

        def missing() -> cpu.Native:
            raise Unavailable("not installed")

        monkeypatch.setattr(cpu, "library", missing)
    choose = cpu_ops.native.__wrapped__
    if expected is None:
        assert choose() is None
    elif expected is cpu.Native:
        assert isinstance(choose(), cpu.Native)
    else:
        with pytest.raises(expected, match="QLM_KERNELS=fast: expected 'native' or 'reference'" if library else "not"):
            choose()


def test_a_library_that_is_not_there_is_an_error() -> None:
    done = run("from qlm.kernels import cpu_ops; cpu_ops.native()", QLM_LIBRARY="/nowhere/libqlm_cpu.so")
    assert MissingInput.__name__ in done.stderr.splitlines()[-1]


# What the kernels do not take -----------------------------------------------------------------------------------------


def nf4_layer(out_features: int, in_features: int, block: int) -> tuple[Tensor, Tensor]:
    codes, absmax = nf4.quantize_nf4(random(out_features, in_features, seed=1), block)
    return packing.pack_nf4(codes), absmax


@pytest.mark.parametrize(
    ("out_features", "in_features", "block"),
    [(6, 96, 64), (8, 32, 64), (8, 128, 32), (3, 5, 64), (4, 96, 96), (2, 64, 128)],
)
def test_nf4_blocks_that_the_kernels_do_not_take(
    out_features: int, in_features: int, block: int, calls: list[int]
) -> None:
    packed, absmax = nf4_layer(out_features, in_features, block)
    x = random(4, in_features)
    shape = {"out_features": out_features, "in_features": in_features, "block": block}
    y = ops.nf4_linear(x, packed, absmax, **shape)
    assert torch.equal(y, ops.nf4_linear_reference(x, packed, absmax, None, *shape.values()))
    assert calls == []
    assert ops.nf4_activations(packed, absmax, in_features=in_features, block=block) == "float"


@pytest.mark.parametrize("block", [64, 128, 192])
def test_nf4_blocks_that_they_take(block: int, calls: list[int]) -> None:
    packed, absmax = nf4_layer(5, 384, block)
    x, shape = random(4, 384), {"out_features": 5, "in_features": 384, "block": block}
    y = ops.nf4_linear(x, packed, absmax, **shape)
    exact = ops.nf4_linear_reference(x, packed, absmax, None, *shape.values())
    assert ((y - exact).norm() / exact.norm()) < 0.02
    assert calls == [cpu.NF4]


def gptq_tensors(bits: int, g_idx: Tensor, groups: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (len(g_idx), 32), generator=generator)
    zero_point = torch.randint(1, 2**bits, (groups, 32), generator=generator)
    scales = (random(groups, 32).abs() / 2**bits).half()
    return packing.pack_rows(codes, bits), packing.encode_zero_points(zero_point, bits), scales, g_idx


UNEVEN = {
    "a short last group": (4, torch.arange(160) // 64, 3),
    "groups inside words": (4, torch.arange(64) // 4, 16),
    "3-bit groups inside words": (3, torch.arange(96) // 16, 6),
    "one group used twice as often": (4, torch.arange(128) // 32 % 3, 4),
    "a group that nothing uses": (4, torch.zeros(64, dtype=torch.int64), 2),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_gptq_groups_that_the_kernels_do_not_take(name: str, calls: list[int], builds: list[int]) -> None:
    bits, g_idx, groups = UNEVEN[name]
    tensors = gptq_tensors(bits, g_idx.int(), groups)
    x = random(4, len(g_idx))
    for _ in range(2):
        y = ops.gptq_linear(x, *tensors, bits=bits, v2=False)
        assert torch.equal(y, ops.gptq_linear_reference(x, *tensors, None, bits, False))
    assert (calls, len(builds)) == ([], 1)
    assert ops.gptq_activations(*tensors, bits=bits, v2=False) == "float"


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_float64_scales_and_views_take_the_reference(kind: str, calls: list[int]) -> None:
    layer, x = Layer(kind), random(4, 320)
    scale = 2 if kind.startswith("gptq") else 1
    for index, change in ((scale, Tensor.double), (0, lambda t: torch.stack([t, t], dim=-1)[..., 0])):
        changed = Layer(kind)
        tensors = list(layer.tensors)
        tensors[index] = change(tensors[index])
        changed.tensors = tuple(tensors)
        assert torch.equal(changed(x), reference(changed, x))
    assert calls == []


# What is kept ---------------------------------------------------------------------------------------------------------

GPTQ = ["gptq-4-v1-seq", "gptq-3-v1-act"]


@pytest.mark.parametrize("kind", GPTQ)
def test_a_gptq_layer_is_prepared_once(kind: str, builds: list[int]) -> None:
    layer = Layer(kind)
    layer.bias = layer.bias.requires_grad_()
    for step in range(3):
        with torch.no_grad():
            layer(random(1, 1, 320, seed=step))
        layer(random(4, 320, seed=step).requires_grad_()).sum().backward()
        layer.bias.data -= 0.1 * layer.bias.grad
    with torch.inference_mode():
        layer(random(2, 320))
    assert len(builds) == 1


@pytest.mark.parametrize("kind", GPTQ)
def test_what_was_prepared_is_freed_with_the_weight(kind: str) -> None:
    gc.collect()
    before = len(cpu_ops._gptq_layers)
    layer = Layer(kind)
    layer(random(2, 320))
    kept = cpu_ops._gptq_layers[layer.tensors[0]]
    assert kept.zero_point.nbytes == 5 * 96
    assert (kept.qweight is None) == (kind == "gptq-4-v1-seq")
    made = [weakref.ref(tensor) for tensor in (kept.zero_point, kept.order, kept.qweight) if tensor is not None]
    assert len(cpu_ops._gptq_layers) == before + 1
    del kept, layer
    gc.collect()
    assert len(cpu_ops._gptq_layers) == before
    assert all(tensor() is None for tensor in made)


@pytest.mark.parametrize("kind", GPTQ)
@pytest.mark.parametrize("index", range(4), ids=["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("how", ["in place", "data", "other tensor"])
def test_changed_tensors_are_noticed(kind: str, index: int, how: str) -> None:
    layer, x = Layer(kind), random(4, 320)
    before = layer(x)
    old = layer.tensors[index]
    new = old.flip(0) if index != 2 else old * 2
    if how == "in place":
        old.copy_(new)
    elif how == "data":
        old.data = new
    else:
        layer.tensors = (*layer.tensors[:index], new, *layer.tensors[index + 1 :])
    fresh = Layer(kind)
    fresh.tensors = tuple(tensor.clone() for tensor in layer.tensors)
    assert torch.equal(layer(x), fresh(x))
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("index", [1, 3], ids=["qzeros", "g_idx"])
def test_another_tensor_at_the_address_of_a_freed_one_is_noticed(index: int) -> None:
    layer, x = Layer("gptq-4-v1-seq"), random(4, 320)
    memory = layer.tensors[index].numpy().copy()
    for change in (lambda: None, lambda: np.copyto(memory, np.flip(memory, 0).copy())):
        change()
        tensors = list(layer.tensors)
        tensors[index] = torch.from_numpy(memory)
        layer.tensors = tuple(tensors)
        with float_activations():
            exact = layer(x)
        assert (layer(x) - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_a_changed_bias_is_noticed(kind: str) -> None:
    layer, x = Layer(kind), random(4, 320)
    before = layer(x)
    layer.bias.data.add_(1.0)
    assert torch.allclose(layer(x), before + 1, atol=1e-5)
    layer.bias = layer.bias.half()
    assert torch.allclose(layer(x), before + 1, atol=1e-2)
    layer.bias.data.zero_()
    no_bias = Layer(kind, with_bias=False)
    assert torch.equal(layer(x), no_bias(x))


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_tensors_of_inference_mode(kind: str, calls: list[int]) -> None:
    x = random(4, 320)
    expected = Layer(kind)(x)
    with torch.inference_mode():
        layer = Layer(kind)
        assert layer.tensors[0].is_inference()
        assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert len(calls) == 3


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_the_same_bits_for_any_number_of_threads(kind: str, threads: Callable[[int], None]) -> None:
    layer, x = Layer(kind, out_features=640), random(9, 320)
    threads(1)
    expected = layer(x)
    for count in (2, 3):
        threads(count)
        assert torch.equal(layer(x), expected)


def test_as_many_threads_as_torch_has_and_on_its_pool(threads: Callable[[int], None]) -> None:
    for count in (1, 2, 3, 2):
        threads(count)
        team = cpu_ops._team()
        assert (team.threads, team.borrowed) == (count, True)
    found = []
    thread = threading.Thread(target=lambda: found.append((cpu_ops._team().threads, torch.get_num_threads())))
    thread.start()
    thread.join()
    assert found[0][0] == found[0][1]


@pytest.mark.parametrize("count", [1, 2])
def test_calls_from_several_threads(count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    layers = [Layer(kind) for kind in FEW_KINDS]
    inputs = [random(5, 320, seed=seed) for seed in range(4)]
    expected = [[Layer(kind)(x) for kind in FEW_KINDS] for x in inputs]
    wrong: list[Any] = []
    start = threading.Barrier(len(inputs))

    def work(x: Tensor, answers: list[Tensor]) -> None:
        start.wait()
        try:
            for _ in range(20):
                wrong.extend(
                    k for k, (f, y) in enumerate(zip(layers, answers, strict=True)) if not torch.equal(f(x), y)
                )
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
