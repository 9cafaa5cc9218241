"""Smoothing one block before its linears are quantized to int8: scales and shifts of activations go into what makes them.

The float block computes the same afterwards (numerics/smooth.py has the algebra; `FamilySpec.folds` says where it holds), and files do not
change: norms, weights and biases have other values. Nothing is folded where a linear that takes part stays in floating point,
whose 16-bit weights would be rounded once more.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlm.arch import FamilySpec
from qlm.arch.spec import Fold
from qlm.numerics.affine import overflowing_row
from qlm.numerics.smooth import COMPENSATED_SHARE, choose_smoothing

# Tokens that scales and shifts are chosen on.
SAMPLE_TOKENS = 1024


@dataclass(frozen=True)
class FoldedBlock:
    """What folding changes in a block.

    Attributes:
        parameters: path inside the block of each parameter that changes to its new value, fp32.
        facts: for each fold, by its source: strength, whether it shifts, the largest and smallest scale, and the expected error of its
            linears' outputs over that without smoothing.
    """

    parameters: dict[str, Tensor]
    facts: dict[str, dict[str, Any]]


def folds_of(
    spec: FamilySpec, config: Any, quantized: Collection[str], not_rounded: Collection[str] = ()
) -> tuple[Fold, ...]:
    """The folds that hold with this config, touch no linear that stays in floating point, and spare one its outliers.

    Args:
        quantized: paths inside the block of the linears that will be quantized to int8.
        not_rounded: those of them whose inputs keep 16 bits: there outliers do no harm, which in the weights they would.
    """
    return tuple(
        fold
        for fold in spec.folds
        if all(getattr(config, name) == value for name, value in fold.when.items())
        and not set(fold.linears) & set(not_rounded)
        and {*fold.linears, *(() if fold.through == "norm" else (fold.source,))} <= set(quantized)
    )


@contextmanager
def sampled_inputs(block: nn.Module, folds: Collection[Fold], tokens: int) -> Iterator[dict[str, Tensor]]:
    """While it is open, forward passes through `block` leave a sample of the inputs that the folds are about.

    Args:
        tokens: that all passes together will have; some SAMPLE_TOKENS of them are kept, evenly spaced.
    Yields:
        path of each fold's first linear to its inputs [T, I], in the dtype that the block computes in.
    """
    every = max(1, tokens // SAMPLE_TOKENS)
    # A step that shares no factor with the usual window lengths visits all places of a window.
    every += every % 2 == 0
    found: dict[str, Tensor] = {}
    passed = dict.fromkeys((fold.linears[0] for fold in folds), 0)

    def hook_for(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            kept = x[-passed[path] % every :: every].clone()
            passed[path] += len(x)
            found[path] = torch.cat([found[path], kept]) if path in found else kept

        return hook

    hooks = [block.get_submodule(path).register_forward_pre_hook(hook_for(path)) for path in passed]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


def fold_parameters(
    parameters: Mapping[str, Tensor],
    spec: FamilySpec,
    config: Any,
    inputs: Mapping[str, Tensor],
    quantized: Collection[str],
    not_rounded: Collection[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    weight_share: float = COMPENSATED_SHARE,
) -> FoldedBlock:
    """Choose the folds of a block and give the values that its parameters then have.

    Args:
        parameters: path inside the block of each parameter to its value, any float dtype, as the checkpoint holds it.
        inputs: path of each fold's first linear to a sample of its inputs [T, I] (`sampled_inputs`).
        quantized, not_rounded: as for `folds_of`.
        dtype: that norms and biases will be stored in: scales and shifts are moved to where a norm's weight and bias, and a
            source's bias, are exact in it.
        weight_share: 1 where weights will be rounded to nearest, less where their errors will be compensated.
    Raises:
        ValueError: an input or a weight is NaN, infinite or too large to be squared; names the layer.
    """
    changed: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}

    def read(name: str) -> Tensor | None:
        value = changed.get(name, parameters.get(name))
        return None if value is None else value.float()

    for fold in folds_of(spec, config, quantized, not_rounded):
        weights = {path: _required(read(f"{path}.weight")) for path in fold.linears}
        biases = {path: read(f"{path}.bias") for path in fold.linears}
        source_weight, source_bias = _required(read(f"{fold.source}.weight")), read(f"{fold.source}.bias")
        x = inputs[fold.linears[0]].float()
        rows = source_rows(fold, spec, config, x.shape[1], x.device)
        # A shift needs somewhere to come from and to go to, and does not pass ReLU.
        may_shift = fold.through != "relu" and all(b is not None for b in (source_bias, *biases.values()))
        try:
            chosen = choose_smoothing(
                x, torch.cat(list(weights.values())), tie=rows, may_shift=may_shift, weight_share=weight_share
            )
        except ValueError as error:
            raise ValueError(f"{', '.join(fold.linears)}: {error}") from None
        for path, weight in weights.items():
            # Here, because what they make of any text would be blamed on the inputs of the linear after them.
            row = overflowing_row(weight)
            if row is not None:
                raise ValueError(
                    f"{path}.weight, row {row}: too large to be squared in fp32; the checkpoint is damaged"
                )
        if chosen.strength == 0 and not chosen.shifted:
            facts[fold.source] = {"strength": 0.0, "shift": False}
            continue
        scale, shift = chosen.scale, chosen.shift
        if fold.through == "norm":
            scale, changed[f"{fold.source}.weight"] = _storable(source_weight, scale, dtype)
        else:
            if fold.through == "relu" and source_bias is not None:
                scale, _ = _storable(source_bias, scale, dtype)
            new_weight = source_weight.clone()
            new_weight[rows] = source_weight[rows] / scale[:, None]
            changed[f"{fold.source}.weight"] = new_weight
        if source_bias is not None:
            new_bias = source_bias.clone()
            new_bias[rows] = ((source_bias[rows] - shift) / scale).to(dtype).float()
            changed[f"{fold.source}.bias"] = new_bias
            if may_shift:
                shift = source_bias[rows] - new_bias[rows] * scale
        for path, weight in weights.items():
            bias = biases[path]
            if may_shift and bias is not None:
                changed[f"{path}.bias"] = bias + weight @ shift
            changed[f"{path}.weight"] = weight * scale
        facts[fold.source] = {
            "strength": chosen.strength, "shift": chosen.shifted, "smallest_scale": scale.min().item(),
            "largest_scale": scale.max().item(), "error_ratio": chosen.error_ratio,
        }  # fmt: skip
    return FoldedBlock(changed, facts)


def fold_block(
    block: nn.Module,
    spec: FamilySpec,
    config: Any,
    inputs: Mapping[str, Tensor],
    quantized: Collection[str],
    *,
    dtype: torch.dtype = torch.float32,
    weight_share: float = COMPENSATED_SHARE,
) -> dict[str, dict[str, Any]]:
    """`fold_parameters` of a block's own parameters, in place. Returns the facts."""
    parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}
    folded = fold_parameters(parameters, spec, config, inputs, quantized, dtype=dtype, weight_share=weight_share)
    with torch.no_grad():
        for name, value in folded.parameters.items():
            block.get_parameter(name).copy_(value)
    return folded.facts


def source_rows(fold: Fold, spec: FamilySpec, config: Any, inputs: int, device: torch.device | str = "cpu") -> Tensor:
    """Which output of a fold's source each input feature of its linears is made of: int64 [I].

    Those of a fused projection are its value rows (`FamilySpec.fused_qkv`); with multi-query attention all heads read the same ones.
    """
    feature = torch.arange(inputs, device=device)
    if fold.through != "attention" or spec.fused_qkv is None:
        return feature
    width = inputs // int(getattr(config, spec.heads))
    if spec.fused_qkv == "multi_query" and config.multi_query:
        return inputs + width + feature % width
    return feature // width * 3 * width + 2 * width + feature % width


def _storable(value: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A scale next to `scale` with which value / scale is exact in `dtype`, and that quotient in fp32. All [I].

    Zeros, and what would be too small or too large for the dtype, keep the scale as it is."""
    stored = (value / scale).to(dtype).float()
    exact = value / stored
    near = (exact / scale - 1).abs() < 2 * torch.finfo(dtype).eps
    return torch.where(near, exact, scale), torch.where(near, stored, value / scale)


def _required(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
