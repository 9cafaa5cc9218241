"""What no checkpoint and no text should hold, through whole runs: every fault is refused by name, tensor and index, or quantized to
finite numbers with what was done on record.

One layer of a family, so that each run takes a fraction of a second; the solvers alone meet the same in tests/numerics.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlm.arch import FAMILIES as SPECS
from qlm.backends.int8 import Int8Linear
from qlm.blocks import choose_settings, quantize_block
from qlm.errors import DataError, UsageError
from qlm.load import block_paths
from qlm.quantize import quantize_model, stream_of
from qlm.recipe import quantize_section
from tests import tiny_models

WIDTH, INNER = 64, 128
MAKERS: dict[str, Callable[[], Any]] = {
    "opt": lambda: tiny_models.opt(hidden_size=WIDTH, ffn_dim=INNER, num_hidden_layers=1, word_embed_proj_dim=WIDTH),
    "gpt_neox": lambda: tiny_models.gpt_neox(hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1),
    "gpt_bigcode": lambda: tiny_models.gpt_bigcode(n_embd=WIDTH, n_inner=INNER, n_layer=1),
}
# Backend and quality; "fast" gptq looks at text, "fast" nf4 and int8 do not.
WAYS = [(backend, quality) for backend in ("gptq", "nf4", "int8") for quality in ("fast", "balanced")]
ways = pytest.mark.parametrize(("backend", "quality"), WAYS, ids=[" ".join(way) for way in WAYS])
# What learns, and what has its bits chosen first: slower, and so with some of the faults only. They say what `balanced` says.
SLOW_WAYS = [("gptq", "best"), ("nf4", "best"), ("int8", "best"), ("gptq", "average_bits")]
STEPS = {"gptq": {"rounding_steps": 3, "tune_steps": 3}, "nf4": {"tune_steps": 3}, "int8": {"tune_steps": 3}}
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Model:
    """A model and the paths of what faults are put into."""

    model: Any
    block: str
    qkv: str
    up: str
    down: str
    norm: str

    def weight(self, path: str, leaf: str = "weight") -> Tensor:
        return self.model.get_parameter(f"{path}.{leaf}").data


def make(family: str) -> Model:
    torch.manual_seed(0)
    model = tiny_models.randomized(MAKERS[family]())
    spec = SPECS[family]
    block = block_paths(spec, model)[0]
    groups = [group for stage in spec.stages for group in stage]
    paths = [f"{block}.{group.linears[-1]}" for group in (groups[0], groups[2], groups[3])]
    return Model(model, block, *paths, f"{block}.{groups[0].norm}")


def run(made: Model, backend: str, quality: str, ids: Tensor | None = None, **more: Any) -> dict[str, dict[str, Any]]:
    section = {"backend": backend, "quality": quality, **({"group_size": 32} if backend == "gptq" else {}), **more}
    if quality == "best":
        section |= STEPS[backend]
    if quality == "average_bits":
        section = {"backend": backend, "average_bits": 3.5, **more}
    calibrated = backend == "gptq" or quality != "fast"
    ids = tiny_models.token_ids(8, 32) if ids is None else ids
    return quantize_model(made.model, section, ids if calibrated else None)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny_models.token_ids()).logits


PARTS: dict[str, Callable[[Model], tuple[str, tuple[int, ...]]]] = {
    "weight": lambda m: (f"{m.up}.weight", (5, 6)),
    "fused weight": lambda m: (f"{m.qkv}.weight", (17, 63)),
    "bias": lambda m: (f"{m.down}.bias", (9,)),
    "norm": lambda m: (f"{m.norm}.weight", (3,)),
    "norm bias": lambda m: (f"{m.norm}.bias", (63,)),
    "embedding": lambda m: (_name_of(m.model, m.model.get_input_embeddings().weight), (200, 1)),
    "last norm": lambda m: (next(n for n, _ in m.model.named_parameters() if n.endswith(("final_layer_norm.weight", "ln_f.weight"))
                                 and not n.startswith(m.block)), (0,)),
}  # fmt: skip


def _name_of(model: nn.Module, wanted: nn.Parameter) -> str:
    return next(name for name, parameter in model.named_parameters() if parameter is wanted)


@ways
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", MAKERS)
def test_values_that_are_no_numbers(family: str, part: str, backend: str, quality: str) -> None:
    """Also where no text would have shown them: int8 and nf4 with `fast`."""
    for value in (NAN, INF, -INF):
        made = make(family)
        name, index = PARTS[part](made)
        before = made.model.get_parameter(name).data
        before[index] = value
        with pytest.raises(DataError) as refused:
            run(made, backend, quality)
        assert str(refused.value) == (
            f"{name}: 1 of {before.numel()} values are NaN or infinite, the first at {list(index)}; the checkpoint is damaged"
        )
        assert all(type(made.model.get_submodule(path)) is nn.Linear for path in (made.qkv, made.up, made.down))


def _scale_norm(m: Model, size: float) -> None:
    for leaf in ("weight", "bias"):
        m.weight(m.norm, leaf).mul_(size)


def _some_dead(m: Model) -> None:
    for leaf in ("weight", "bias"):
        m.weight(m.norm, leaf)[::3] = 0


def _duplicate(m: Model) -> None:
    for leaf in ("weight", "bias"):
        half = m.weight(m.norm, leaf)
        half[32:] = half[:32]
    m.model.get_input_embeddings().weight.data[:, 32:] = m.model.get_input_embeddings().weight.data[:, :32]
    for name, parameter in m.model.named_parameters():
        if name.endswith(("embed_positions.weight", "wpe.weight")):
            parameter.data[:, 32:] = parameter.data[:, :32]


@dataclass(frozen=True)
class Fault:
    """What is done to a model, and what each way says: the words that an error must hold, after the name of the linear at fault; a
    way that is not in `refused` must quantize it. `constant`: a linear's inputs may end up the same for every token, which leaves a
    Hessian about the mean without anything; then that may be said instead."""

    do: Callable[[Model], object]
    refused: dict[tuple[str, str], tuple[str, str]]
    constant: bool = False


def _text_only(at: str, words: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Refused by all that look at text."""
    return {way: (at, words) for way in WAYS if way in (("gptq", "fast"),) or way[1] == "balanced"}


TOO_LARGE = {
    ("gptq", "fast"): ("up", r"\.weight, row {row}: a scale of -?\d.*e\+28 does not fit into fp16"),
    ("gptq", "balanced"): ("up", r"\.weight, row {row}: a scale of -?\d.*e\+28 does not fit into fp16"),
    ("nf4", "balanced"): ("up", r"\.weight, row {row}: .*too large for fp32"),
    ("int8", "balanced"): ("up", r"\.weight, row {row}: too large to be squared in fp32; the checkpoint is damaged"),
    ("gptq", "average_bits"): (
        "up",
        r"\.weight, row {row}: too large to be squared in fp32; the checkpoint is damaged",
    ),
}


def _too_large(row: int) -> dict[tuple[str, str], tuple[str, str]]:
    return {way: (at, words.format(row=row)) for way, (at, words) in TOO_LARGE.items()}


NO_DIAGONAL = r"[\w., ]+: the Hessian .* diagonal is 0.*on_failure: round_to_nearest"
NOTHING = _text_only("qkv", NO_DIAGONAL)
FAULTS = {
    "weights of 1e30": Fault(lambda m: m.weight(m.up).abs_().mul_(1e30), _too_large(0)),
    "a row of 1e30": Fault(lambda m: m.weight(m.up)[7].abs_().mul_(1e30), _too_large(7)),
    "weights of 1e-30": Fault(lambda m: m.weight(m.up).mul_(1e-30), {}, constant=True),
    "subnormal weights": Fault(lambda m: m.weight(m.up).mul_(1e-42), {}, constant=True),
    "fp16's largest": Fault(lambda m: m.weight(m.up).sign_().mul_(65504), {}),
    "a column of 1e4": Fault(lambda m: m.weight(m.up)[:, 7].mul_(1e4), {}),
    "a weight of 1e4": Fault(lambda m: m.weight(m.up)[3, 7].fill_(1e4), {}),
    "constant weights": Fault(lambda m: m.weight(m.up).fill_(0.3), {}),
    "equal rows": Fault(lambda m: m.weight(m.up).copy_(m.weight(m.up)[:1].expand(INNER, -1).clone()), {}),
    "zero weights": Fault(lambda m: m.weight(m.up).zero_(), {}, constant=True),
    "zero rows": Fault(lambda m: m.weight(m.qkv)[3:9].zero_(), {}),
    "dead inputs": Fault(_some_dead, {}),
    "all inputs dead": Fault(lambda m: _scale_norm(m, 0.0), NOTHING),
    "inputs of one direction": Fault(lambda m: m.weight(m.norm).zero_(), {}, constant=True),
    "duplicate inputs": Fault(_duplicate, {}),
    "an input of 1e4": Fault(lambda m: m.weight(m.norm)[7].mul_(1e4), {}),
    "inputs of 1e30": Fault(
        lambda m: _scale_norm(m, 1e30), _text_only("qkv", r": 64 of its 64 input features are too large to be squared .* feature 0")
    ),
    "an input of 1e30": Fault(
        lambda m: m.weight(m.norm)[7].mul_(1e30), _text_only("qkv", r": 1 of its 64 input features are too large to be squared .* feature 7")
    ),
    "inputs of 1e-30": Fault(lambda m: _scale_norm(m, 1e-30), NOTHING),
    "activations that overflow": Fault(
        lambda m: m.model.get_input_embeddings().weight.data.fill_(3e38),
        _text_only("qkv", r": 64 of its 64 input features are NaN or infinite on the calibration text, the first feature 0"),
    ),
}  # fmt: skip


# Those that learning and choosing bits could make something of that the solvers alone do not.
LEARNED = (
    "a row of 1e30", "weights of 1e-30", "fp16's largest", "a weight of 1e4", "zero weights", "zero rows", "dead inputs", "all inputs dead",
    "duplicate inputs", "an input of 1e4", "an input of 1e30", "activations that overflow",
)  # fmt: skip
# Over its ways each fault meets all families.
MEETINGS = {
    f"{fault}, {' '.join(way)}": (fault, *way, list(MAKERS)[(i + j) % len(MAKERS)])
    for i, fault in enumerate(FAULTS)
    for j, way in enumerate([*WAYS, *(SLOW_WAYS if fault in LEARNED else ())])
}


@pytest.mark.parametrize(("fault", "backend", "quality", "family"), MEETINGS.values(), ids=MEETINGS)
def test_refused_by_name_or_finite(fault: str, backend: str, quality: str, family: str) -> None:
    made = make(family)
    refused_by = FAULTS[fault].refused
    wanted = refused_by.get((backend, quality)) or refused_by.get(
        (backend, "balanced" if quality != "fast" else quality)
    )
    FAULTS[fault].do(made)
    float_logits = logits(made.model)
    if wanted is not None:
        at, words = wanted
        # A group of linears that share their input is named as a whole; the message begins with its first.
        path = getattr(made, at)
        with pytest.raises(DataError, match=words) as refused:
            run(made, backend, quality)
        assert path.rpartition(".")[0] in str(refused.value).partition(": ")[0]
        return
    try:
        facts = run(made, backend, quality)
    except DataError as error:
        if FAULTS[fault].constant and re.fullmatch(NO_DIAGONAL, str(error)):
            return
        raise
    assert facts.keys() == {
        f"{made.block}.{name}" for stage in SPECS[family].stages for group in stage for name in group.linears
    }
    for fact in facts.values():
        assert all(math.isfinite(value) for value in fact.values() if isinstance(value, float))
        learned = "relative_error_before_learning" in fact
        assert 0 <= fact["relative_error_before_learning" if learned else "relative_error"] <= 1.01
        assert "why" not in fact
        if backend == "gptq" or quality != "fast":
            assert fact["damp"] >= 0.01
            assert fact["method"] in ("gptq", "compensated")
    for module in made.model.modules():
        if isinstance(module, Int8Linear):
            assert module.weight.min() >= -127
    for name, tensor in made.model.state_dict().items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    # The float model itself overflows on some.
    if float_logits.isfinite().all():
        assert logits(made.model).isfinite().all()


@ways
@pytest.mark.parametrize(("samples", "length"), [(1, 2), (2, 3)])
def test_fewer_tokens_than_inputs(samples: int, length: int, backend: str, quality: str) -> None:
    made = make("opt")
    facts = run(made, backend, quality, tiny_models.token_ids(samples, length))
    assert logits(made.model).isfinite().all()
    for fact in facts.values():
        assert 0 <= fact["relative_error"] < 1
        if backend == "gptq" or quality == "balanced":
            assert fact["tokens"] == (samples - (samples > 1 and quality == "balanced")) * length


@pytest.mark.parametrize("backend", ["gptq", "nf4", "int8"])
class TestOnRecord:
    def test_more_damping_than_asked_for(self, backend: str) -> None:
        """Two inputs that are alive and next to no damping: what was needed is a doubling of what was asked for."""
        made = make("gpt_neox")
        for leaf in ("weight", "bias"):
            made.weight(made.norm, leaf)[2:] = 0
        facts = (
            run(made, backend, "balanced", damp=1e-12, smooth=False)
            if backend == "int8"
            else run(made, backend, "balanced", damp=1e-12)
        )
        damp = facts[made.qkv]["damp"]
        assert 1e-12 < damp < 1e-3
        assert math.log2(damp / 1e-12) == pytest.approx(round(math.log2(damp / 1e-12)))
        assert logits(made.model).isfinite().all()

    def test_rounding_to_nearest_where_nothing_can_be_told(self, backend: str) -> None:
        made = make("gpt_bigcode")
        _scale_norm(made, 0.0)
        facts = run(made, backend, "balanced", on_failure="round_to_nearest")
        assert "diagonal is 0" in facts[made.qkv]["why"]
        assert facts[made.qkv]["method"] in ("round_to_nearest", "absmax")
        assert 0 < facts[made.qkv]["relative_error"] < 0.2
        assert not [name for name, fact in facts.items() if "why" in fact and name != made.qkv]
        assert logits(made.model).isfinite().all()


@torch.no_grad()
def test_a_bias_that_leaves_its_dtype() -> None:
    """float16's largest bias, and a correction that goes beyond it."""
    made = make("opt")
    made.weight(made.down).mul_(1000)
    made.weight(made.down, "bias").fill_(65504)
    spec, config = SPECS["opt"], made.model.config
    section = quantize_section({"backend": "nf4", "quality": "balanced"}, True)
    stream = stream_of(made.model, spec, made.block, tiny_models.token_ids(8, 32), "cpu", section)
    values = {name: parameter.data.clone() for name, parameter in made.model.named_parameters()}
    block, chosen = made.model.get_submodule(made.block), choose_settings(made.model, spec, section)
    with pytest.raises(DataError) as refused:
        quantize_block(block, made.block, spec, config, chosen, values.__getitem__, stream, torch.float16)
    words = r"layers\.0\.fc2\.bias: \d+ of 64 values are NaN or infinite, the first at \[\d+\]; .* does not fit into torch.float16"
    assert re.search(words, str(refused.value))


def test_a_residual_stream_that_leaves_its_dtype() -> None:
    """In a float16 model, whose largest number is below the sum."""
    made = make("opt")
    made.model.half()
    made.weight(made.up, "bias").fill_(300)
    made.weight(made.down).mul_(30)
    made.weight(made.down, "bias").fill_(65504)
    with pytest.raises(DataError, match=r"layers\.0\.fc2: \d+ of its 64 outputs .* are NaN.*, the first feature \d+; "):
        run(made, "gptq", "balanced")


def test_weights_that_smoothing_does_not_look_at() -> None:
    made = make("opt")
    made.weight(made.up)[7].abs_().mul_(1e30)
    with pytest.raises(DataError, match=r"layers\.0\.fc1\.weight, row 7: .*too large for fp32"):
        run(made, "int8", "balanced", smooth=False)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("gptq", "quantize.group_size: 128 does not divide the 96 inputs of gpt_neox.layers.0.attention.query_key_value; "),
        ("nf4", "quantize.backend: nf4 stores blocks of 64 weights, and gpt_neox.layers.0.attention.query_key_value has 96 inputs, "),
    ],
)  # fmt: skip
def test_a_last_group_that_is_not_full(backend: str, words: str) -> None:
    torch.manual_seed(0)
    model = tiny_models.randomized(tiny_models.gpt_neox(hidden_size=96, intermediate_size=128, num_hidden_layers=1))
    with pytest.raises(UsageError, match="^" + re.escape(words)):
        quantize_model(model, {"backend": backend}, tiny_models.token_ids(2, 8))
