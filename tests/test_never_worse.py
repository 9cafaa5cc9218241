"""Never worse than rounding to nearest: every backend, on the layers of trained models and on random ones, by what is stored.

What is compared is tr((W - Q) H (W - Q)^T), H the damped Hessian of a layer's inputs, row by row, in float64. tests/numerics has the same
of each algorithm by itself, and under worse Hessians than any text makes; test_never_worse_in_a_run.py has whole runs, whose linears come
near to more than their own weight.
"""

import functools
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlm.arch import FAMILIES
from qlm.backends import BACKENDS, Statistics
from qlm.backends.base import QuantizedLinear
from qlm.blocks import stages_of
from qlm.load import block_paths, load, load_tokenizer
from qlm.numerics.affine import quantize_weight_per_channel_absmax
from qlm.numerics.gptq import round_to_nearest
from qlm.numerics.nf4 import codebook
from qlm.numerics.nf4_search import quantize_nf4_under
from qlm.recipe import LinearSettings, quantize_section, settings_for
from qlm.stream import Stream
from tests.conftest import ROOT

CHECKPOINTS = ("tiny-opt", "tiny-gpt-neox", "tiny-gpt-bigcode")
BITS, ORDERS = (2, 3, 4, 8), ("none", "act", "gar", "static")
# Relative; float32 losses decide which row is kept, under Hessians of condition 1e4.
TOLERANCE = 1e-4
# Outputs of each trained layer that are quantized: rows do not depend on each other.
ROWS = 96
# What float32 loses of a quadratic form, relative to the largest that it could be.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Layer:
    name: str
    weight: Tensor  # fp32 [O, I]
    statistics: Statistics


@functools.cache
def layers(checkpoint: str) -> list[Layer]:
    """Every linear of the demo's model, with what it reads of 1,024 tokens of text: as many as the widest has inputs."""
    folder = ROOT / "evals" / "checkpoints" / checkpoint
    model, tokenizer = load(folder), load_tokenizer(folder)
    text = "python" if "bigcode" in checkpoint else "english"
    words = (ROOT / "calibration_data" / f"{text}.txt").read_text("utf-8")[:20_000]
    ids = torch.tensor(tokenizer(words)["input_ids"][:1024]).view(8, 128)
    spec = FAMILIES[model.config.model_type]
    blocks = block_paths(spec, model)
    stream, found = Stream(model, spec, blocks[0], ids), []
    with torch.no_grad():
        for path in blocks:
            block = model.get_submodule(path)
            for stage in stages_of(spec, model.config):
                for group, statistics in stream.statistics(block, stage, path).items():
                    for linear in group.linears:
                        weight = block.get_submodule(linear).weight.detach()
                        found.append(
                            Layer(f"{path}.{linear}", weight[:: len(weight) // ROWS][:ROWS].contiguous(), statistics)
                        )
            stream.advance(block)
    return found


def settings_of(backend: str, **keys: Any) -> LinearSettings:
    found = settings_for(quantize_section({"backend": backend, **keys}, True), "a.0.b")
    assert found is not None
    return found


def damped(hessian: Tensor, damp: float) -> Tensor:
    hessian = hessian.double()
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def losses(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """float64 [O]."""
    E = weight.double() - quantized.double()
    return ((E @ hessian) * E).sum(1)


def stored(made: QuantizedLinear, weight: Tensor, backend: str, how: LinearSettings) -> Tensor:
    format = BACKENDS[backend].format(how, weight.dtype)
    return BACKENDS[backend].dequantize(made.tensors, (weight.shape[0], weight.shape[1]), format)


def nearest(weight: Tensor, made: QuantizedLinear, backend: str, how: LinearSettings) -> Tensor:
    """Rounding to nearest in the same format, with the same kind of grid."""
    if backend == "gptq":
        search = how.scale_search == "weighted"
        g_idx = made.tensors["g_idx"]
        return round_to_nearest(weight, g_idx, bits=how.bits, symmetric=how.symmetric, search=search).dequantize()
    if backend == "int8":
        codes, scale = quantize_weight_per_channel_absmax(weight)
        return codes * scale
    plain = quantize_nf4_under(weight, search=False, double_quant=how.double_quant)
    levels = codebook()[plain.codes.long()].view(-1, 64)
    return (levels * plain.absmax[:, None]).view_as(weight)


def check(layer: Layer, backend: str, how: LinearSettings) -> float:
    """Returns the error over that of rounding to nearest."""
    (made,) = BACKENDS[backend].quantize({layer.name: layer.weight}, layer.statistics, how)
    Q, N = stored(made, layer.weight, backend, how), nearest(layer.weight, made, backend, how)
    # int8 compares under the Hessian as it is.
    H = damped(layer.statistics.hessian, 0.0 if backend == "int8" else made.facts["damp"])
    mine, its = losses(layer.weight, Q, H), losses(layer.weight, N, H)
    rounding = ROUNDING * H.diagonal().max() * layer.weight.double().square().sum(1)
    assert (mine <= its * (1 + TOLERANCE) + rounding).all(), layer.name
    return (mine.sum() / its.sum()).sqrt().item() if its.sum() > 0 else 0.0


def gptq_ways() -> Iterator[dict[str, Any]]:
    """All orders and bits; the other choices in turn, so that each meets each over the layers of a model."""
    for i, (order, bits) in enumerate(itertools.product(ORDERS, BITS)):
        yield {
            "order": order, "bits": bits, "sweeps": 2 * (i // 2 % 2), "symmetric": i % 2 == 0, "group_size": (64, 128, -1)[i % 3],
            "scale_search": ("weighted", "minmax")[i // 4 % 2],
        }  # fmt: skip


# How much of rounding to nearest's error is left on trained layers, at most: the mean over a model's layers.
MOST_LEFT = {"gptq": 0.6, "nf4": 0.5, "int8": 0.5}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
class TestTrainedLayers:
    def test_gptq(self, checkpoint: str) -> None:
        """Each layer one way: each way once over 16 layers, in a random order, so that all kinds of linears meet it."""
        ways, left = list(gptq_ways()), []
        shuffle = random.Random(checkpoint)
        turns = [way for _ in range(2) for way in shuffle.sample(ways, len(ways))]
        for layer, way in zip(layers(checkpoint), turns, strict=False):
            # From one model to the next, the other half of what goes in turn.
            how = {**way, "sweeps": 2 - way["sweeps"]} if checkpoint == "tiny-gpt-neox" else way
            left.append(check(layer, "gptq", settings_of("gptq", **how)))
        assert sum(left) / len(left) < MOST_LEFT["gptq"]

    def test_nf4(self, checkpoint: str) -> None:
        left = []
        for i, layer in enumerate(layers(checkpoint)[::3]):
            left.append(check(layer, "nf4", settings_of("nf4", sweeps=2 * (i % 2), double_quant=i % 4 > 1)))
        assert sum(left) / len(left) < MOST_LEFT["nf4"]

    def test_int8(self, checkpoint: str) -> None:
        left = []
        for i, layer in enumerate(layers(checkpoint)):
            left.append(check(layer, "int8", settings_of("int8", sweeps=2 * (i // 3 % 2))))
        assert sum(left) / len(left) < MOST_LEFT["int8"]


@dataclass(frozen=True)
class _Kinds:
    weights = ("normal", "heavy", "one-sided", "sparse", "equal rows")
    inputs = ("correlated", "few", "one direction", "outlier", "copies", "constant")


def made_up(kinds: tuple[str, str], outputs: int, inputs: int, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(outputs, inputs, generator=generator)
    x = (
        torch.randn(2 * inputs, inputs, generator=generator)
        @ torch.randn(inputs, inputs, generator=generator)
        / inputs**0.5
    )
    x = x + torch.randn(inputs, generator=generator)
    kind_of_weight, kind_of_input = kinds
    if kind_of_weight == "heavy":
        weight = 400 * weight**3
    elif kind_of_weight == "one-sided":
        weight = weight.abs()
    elif kind_of_weight == "sparse":
        weight = torch.where(weight.abs() > 0.06, weight, 0)
    elif kind_of_weight == "equal rows":
        weight = weight[:1].expand_as(weight).clone()
    if kind_of_input == "few":
        x = x[: inputs // 4]
    elif kind_of_input == "one direction":
        x = x[:, :1] * x[:1]
    elif kind_of_input == "outlier":
        x[:, 3] *= 1e3
    elif kind_of_input == "copies":
        x[:, inputs // 2 :] = x[:, : inputs // 2]
    elif kind_of_input == "constant":
        x = torch.ones_like(x)
    return Layer("made up", weight, Statistics(x.T @ x / len(x), len(x)))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.sampled_from(_Kinds.weights), st.sampled_from(_Kinds.inputs)), st.sampled_from([32, 64]),
    st.sampled_from([64, 128, 192]), st.integers(0, 1000), st.sampled_from(sorted(BACKENDS.keys() - {"quanto"})), st.sampled_from(BITS),
    st.sampled_from(ORDERS), st.booleans(), st.booleans(), st.integers(0, 3), st.sampled_from([0.01, 1e-4, 1.0]),
)  # fmt: skip
def test_made_up_layers(
    kinds: tuple[str, str], outputs: int, inputs: int, seed: int, backend: str, bits: int, order: str, symmetric: bool,
    search: bool, sweeps: int, damp: float,
) -> None:  # fmt: skip
    keys: dict[str, Any] = {"sweeps": sweeps, "damp": damp}
    if backend == "gptq":
        keys |= {"bits": bits, "order": order, "symmetric": symmetric, "group_size": 32}
    if backend == "nf4":
        keys["double_quant"] = symmetric
    if backend != "int8":
        keys["scale_search"] = "weighted" if search else "minmax"
    check(made_up(kinds, outputs, inputs, seed), backend, settings_of(backend, **keys))


def levels_of(made: QuantizedLinear, shape: tuple[int, int], backend: str, how: LinearSettings) -> Tensor:
    """Every level that each weight's group has: float64 [O, I, levels]."""
    if backend == "int8":
        return (made.tensors["weight_scale"].double() * torch.arange(-127, 128))[:, None].expand(*shape, 255)
    if backend == "nf4":
        absmax = made.tensors["weight.absmax"].double().view(shape[0], -1).repeat_interleave(64, 1)
        return absmax[..., None] * codebook().double()
    rounded = round_to_nearest(torch.zeros(shape), made.tensors["g_idx"], bits=how.bits, symmetric=True, search=False)
    assert (rounded.zero_point == 2 ** (how.bits - 1)).all()
    scale = made.tensors["scales"].T.double()[:, made.tensors["g_idx"].long()]
    return scale[..., None] * (torch.arange(2**how.bits) - 2 ** (how.bits - 1))


@pytest.mark.parametrize(
    ("backend", "keys"),
    [("int8", {}), ("nf4", {}), *(("gptq", {"bits": bits, "order": order}) for bits in BITS for order in ORDERS)],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_the_unit_hessian_gives_rounding_to_nearest(backend: str, keys: dict[str, Any]) -> None:
    """With compensation, of inputs that say nothing of each other: every weight has the level nearest to it, exactly."""
    weight = 0.05 * torch.randn(32, 256, generator=torch.Generator().manual_seed(3))
    how = settings_of(backend, sweeps=0, **keys)
    (made,) = BACKENDS[backend].quantize({"a": weight}, Statistics(torch.eye(256), 9), how)
    levels = levels_of(made, (32, 256), backend, how)
    least = (levels - weight.double()[..., None]).abs().amin(-1)
    found = (stored(made, weight, backend, how).double() - weight.double()).abs()
    # The product of scale and code is rounded to float32.
    assert (found <= least + 1e-7 * weight.abs().max()).all()
    if backend == "gptq":
        N = round_to_nearest(weight, made.tensors["g_idx"], bits=how.bits, symmetric=True, search=True)
        assert torch.equal(stored(made, weight, backend, how), N.dequantize())


def papers_gptq(weight: Tensor, hessian: Tensor, order: Tensor, bits: int, group_size: int) -> Tensor:
    """The paper's algorithm 1 without its blocks, in float64, asymmetric min-max grids: the Cholesky factor of the inverse is made once,
    and each column's error over its diagonal element goes to the columns after it. Returns Q [O, I]."""
    W = weight.double()[:, order].clone()
    U = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    Q, top = torch.zeros_like(W), 2**bits - 1
    for j in range(W.shape[1]):
        if j % group_size == 0:
            members = W[:, j : j + group_size]
            low, high = members.amin(1).clamp(max=0), members.amax(1).clamp(min=0)
            scale = torch.maximum((high - low) / top, high / (top - 1)).half().double()
            zero = (-low / scale).round().clamp(1, top)
        Q[:, j] = scale * (((W[:, j] / scale).round() + zero).clamp(0, top) - zero)
        W[:, j + 1 :] -= torch.outer((W[:, j] - Q[:, j]) / U[j, j], U[j, j + 1 :])
    found = torch.empty_like(Q)
    found[:, order] = Q
    return found


@pytest.mark.parametrize("order", ["none", "act", "gar"])
def test_with_everything_off_it_is_plain_gptq(order: str) -> None:
    """On a trained layer. Where float32 tips a tie, the rest of that row's group goes another way: few rows, and no worse."""
    layer = layers("tiny-opt")[9]
    how = settings_of(
        "gptq", quality="fast", scale_search="minmax", order=order, symmetric=False, group_size=64, target_shift=0.0, sweeps=0
    )  # fmt: skip
    (made,) = BACKENDS["gptq"].quantize({layer.name: layer.weight}, layer.statistics, how)
    assert made.facts["nearest_rows"] == 0
    H = damped(layer.statistics.hessian, 0.01)
    diagonal = layer.statistics.hessian.diagonal()
    columns = torch.arange(len(H)) if order == "none" else diagonal.argsort(descending=True, stable=True)
    if order == "gar":
        grouped = diagonal.view(-1, 64)
        first = grouped.amax(1).argsort(descending=True, stable=True)
        columns = torch.cat([64 * g + grouped[g].argsort(descending=True, stable=True) for g in first])
    expected, found = papers_gptq(layer.weight, H, columns, 4, 64), stored(made, layer.weight, "gptq", how)
    same = (found - expected).abs().amax(1) < 1e-6
    assert same.float().mean() > 0.5
    mine, its = losses(layer.weight, found, H), losses(layer.weight, expected, H)
    assert torch.allclose(mine[same], its[same], rtol=1e-5)
    assert mine.sum() == pytest.approx(its.sum().item(), rel=5e-3)


def test_every_linear_is_there() -> None:
    """The layers above are all that a recipe quantizes."""
    for checkpoint in CHECKPOINTS:
        config = json.loads((ROOT / "evals" / "checkpoints" / checkpoint / "config.json").read_text())
        count = (
            6 * config["num_hidden_layers"]
            if "opt" in checkpoint
            else 4 * config.get("num_hidden_layers", config.get("n_layer"))
        )
        assert len({layer.name for layer in layers(checkpoint)}) == count
        assert all(
            isinstance(layer.weight, Tensor) and not isinstance(layer.weight, nn.Parameter)
            for layer in layers(checkpoint)
        )
