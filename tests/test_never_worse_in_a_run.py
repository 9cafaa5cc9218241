"""Never worse than rounding to nearest, in whole runs: where targets are shifted, biases corrected, outliers folded and codes learned.

What a linear is to come near to is then not W x~, x~ what it reads in the quantized model, but t = W x~ + b + a (t' - W x~ - b) and the
mean of t', with t' what the float model has there, its residual stream where the output is added to that, and a the strength on record.
E|t - Q x~ - b'|^2 is what must not be larger than rounding W to nearest makes it. tr((W - Q) H (W - Q)^T) alone may be: a weight that
repairs the layers before it lies off W, by more than rounding at 8 bits does.

Both models are watched through hooks of their linears; nothing here is `Stream`'s or `Statistics`'. Sums are float64.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qlm import blocks
from qlm.arch import FAMILIES
from qlm.backends import BACKENDS
from qlm.backends.base import QuantizedLinear
from qlm.kernels.cpu_ops import float_activations
from qlm.load import block_paths, load, load_tokenizer
from qlm.quantize import quantize_model
from qlm.recipe import quantize_section, settings_for
from tests.conftest import ROOT
from tests.test_never_worse import nearest

# The first blocks of each checkpoint, and the length of its windows: targets are shifted from the second linear on.
BLOCKS, LENGTH = 2, 128
# One window in so many is kept aside by the quantizer.
HELD_OUT = 8
# Relative, of a layer: sums here are of the same tokens as the quantizer's, in float64 instead of float32.
TOLERANCE = 1e-3
# How much of rounding to nearest's error is left, at most: the mean over a model's layers.
MOST_LEFT = 0.4

STEPS = {"rounding_steps": 10, "tune_steps": 5}
# Checkpoint, windows, and the recipe's section.
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gptq 4": ("tiny-opt", 8, {"backend": "gptq", "bits": 4}),
    "gptq 3": ("tiny-gpt-neox", 8, {"backend": "gptq", "bits": 3}),
    "gptq 2": ("tiny-gpt-bigcode", 8, {"backend": "gptq", "bits": 2, "group_size": 64}),
    "gptq 8": ("tiny-gpt-neox", 8, {"backend": "gptq", "bits": 8}),
    "gptq 3 best": ("tiny-gpt-bigcode", 8, {"backend": "gptq", "bits": 3, "quality": "best", **STEPS}),
    "nf4": ("tiny-opt", 8, {"backend": "nf4"}),
    "int8": ("tiny-gpt-neox", 12, {"backend": "int8"}),
    "int8 unsmoothed": ("tiny-gpt-neox", 12, {"backend": "int8", "smooth": False}),
}


@dataclass(frozen=True)
class Run:
    """A run's models: the float one, its outliers folded as the quantizer did, and the quantized one."""

    text: Tensor
    section: dict[str, Any]
    folded: Any
    quantized: Any
    facts: dict[str, dict[str, Any]]


def first_blocks(model: Any) -> Any:
    path = block_paths(FAMILIES[model.config.model_type], model)[0].rpartition(".")[0]
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, model.get_submodule(path)[:BLOCKS])
    return model


@torch.no_grad()
def run(checkpoint: str, samples: int, section: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Run:
    folder = ROOT / "evals" / "checkpoints" / checkpoint
    name = "python" if "bigcode" in checkpoint else "english"
    words = (ROOT / "calibration_data" / f"{name}.txt").read_text("utf-8")[:20_000]
    text = torch.tensor(load_tokenizer(folder)(words)["input_ids"][: samples * LENGTH]).view(samples, LENGTH)
    model = first_blocks(load(folder))
    folded, changes = copy.deepcopy(model), []
    fold = blocks.fold_parameters

    def keep(*args: Any, **more: Any) -> Any:
        changes.append(fold(*args, **more))
        return changes[-1]

    monkeypatch.setattr(blocks, "fold_parameters", keep)
    facts = quantize_model(model, section, text)
    paths = block_paths(FAMILIES[model.config.model_type], model)
    plain = folded(text[:2]).logits
    for path, change in zip(paths, changes, strict=False):
        for inner, value in change.parameters.items():
            folded.get_parameter(f"{path}.{inner}").copy_(value)
    # A float model like any other: what it computes is the checkpoint's.
    assert torch.allclose(folded(text[:2]).logits, plain, atol=1e-4)
    return Run(text, section, folded, model, facts)


@torch.no_grad()
def watched(model: Any, paths: Sequence[str], text: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each module, float64 [T, ...], over the text."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(path: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            found[path] = (args[0].double().flatten(0, -2), output.double().flatten(0, -2))

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(hook_for(path)) for path in paths]
    try:
        with float_activations():
            model(text)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def rounded_per_token(x: Tensor) -> Tensor:
    """int8's input as it is multiplied: 256 levels over each token's range and 0."""
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    step = (high - low) / 255
    zero = (-128 - low / step).round()
    return ((x / step).round() + zero).clamp(-128, 127).sub(zero) * step


@dataclass(frozen=True)
class Ratios:
    """Errors over rounding to nearest's.

    Attributes:
        name: of the linear. strength: a.
        target: of E|t - Q x~ - b'|^2, and rounding to nearest with the float bias.
    """

    name: str
    strength: float
    target: float


def ratios(made: Run) -> list[Ratios]:
    """Of all linears, by the tokens that the quantizer has fitted to."""
    spec = FAMILIES[made.folded.config.model_type]
    section = quantize_section(made.section, True)
    backend, paths = BACKENDS[section.backend], block_paths(spec, made.folded)
    text = made.text[: -(len(made.text) // HELD_OUT)]
    there, here = (watched(model, [*paths, *made.facts], text) for model in (made.folded, made.quantized))
    found = []
    for name, facts in made.facts.items():
        path = next(path for path in paths if name.startswith(f"{path}."))
        attention = f"{path}.{spec.attention_out}"
        linear, stored = made.folded.get_submodule(name), made.quantized.get_submodule(name)
        W, b, after = linear.weight.detach(), linear.bias.detach().double(), stored.bias.detach().double()
        how, tensors = settings_for(section, name), stored.state_dict()
        assert how is not None
        Q = backend.dequantize(tensors, (W.shape[0], W.shape[1]), backend.format(how, W.dtype)).double()
        N = nearest(W, QuantizedLinear(tensors, facts), section.backend, how).double()
        W, x, aim = W.double(), here[name][0], there[name][1]
        x = rounded_per_token(x) if section.backend == "int8" else x
        if name.endswith(spec.residual_linears):
            # The float model's residual stream after it, less what the quantized model's holds before.
            aim = aim + there[path][0] - here[path][0]
        if name.endswith(spec.mlp_out):
            aim = aim + there[attention][1] - here[attention][1]
        own, strength = x @ W.T + b, facts["target_shift"]
        target = own + strength * (aim - own)
        target += (aim - target).mean(0)
        found.append(
            Ratios(
                name,
                strength,
                ((target - x @ Q.T - after).square().sum() / (target - x @ N.T - b).square().sum()).item(),
            )
        )
    return found


@pytest.mark.parametrize("which", RUNS)
def test_no_layer_is_worse_than_rounding_to_nearest(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(*RUNS[which], monkeypatch)
    found = ratios(made)
    assert len(found) == len(made.facts)
    assert any(of.strength > 0.1 for of in found), "nothing has been shifted"
    for of in found:
        assert of.target <= 1 + TOLERANCE, of
    assert sum(of.target for of in found) / len(found) < MOST_LEFT
