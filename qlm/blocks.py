"""One block: which of its linears are quantized how, and quantizing them stage by stage.

Nothing here knows where weights come from or where results go; `quantize` (folders) and `quantize_model` (memory) do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlm.arch import FamilySpec, LinearGroup
from qlm.backends import BACKENDS, Backend, QuantizedLinear, Statistics
from qlm.calibrate import Stream
from qlm.errors import UsageError
from qlm.formats.layout import in_block
from qlm.load import linear_paths
from qlm.recipe import LinearSettings, QuantizeRecipe, settings_for, unmatched_globs


def stages_of(spec: FamilySpec, config: Any) -> tuple[tuple[LinearGroup, ...], ...]:
    """The stages of a block, for this config: parallel residual or not."""
    parallel = spec.parallel_stages is not None and bool(getattr(config, spec.parallel_if or ""))
    return spec.parallel_stages if parallel and spec.parallel_stages is not None else spec.stages


def choose_settings(model: nn.Module, spec: FamilySpec, section: QuantizeRecipe) -> dict[str, LinearSettings]:
    """Path of each linear that will be quantized to its settings, in the order of the model.

    Raises:
        UsageError: a glob that matches nothing, a shape that the settings cannot hold, or nothing left to quantize.
    """
    backend = BACKENDS[section.backend]
    linears = [name for name in linear_paths(model) if in_block(name)]
    for glob in unmatched_globs(section, linears):
        raise UsageError(f"quantize: {glob!r} matches none of the model's linears, such as {linears[0]!r}")
    chosen = {}
    for name in linears:
        settings = settings_for(section, name)
        if settings is not None:
            linear = cast(nn.Linear, model.get_submodule(name))
            backend.check(name, (linear.out_features, linear.in_features), settings)
            chosen[name] = settings
    if not chosen:
        raise UsageError("quantize.skip: every linear is left out; there is nothing to quantize")
    return chosen


def quantize_block(
    block: nn.Module,
    path: str,
    stages: Sequence[Sequence[LinearGroup]],
    chosen: Mapping[str, LinearSettings],
    read_weight: Callable[[str], Tensor],
    stream: Stream | None,
) -> dict[str, QuantizedLinear]:
    """Quantize the linears of one block, stage by stage, so that each sees what the quantized ones before it produce.

    Args:
        block: its linears' weights are replaced by their dequantized selves where there is a stream.
        read_weight: the full name of a linear to its weight as the checkpoint holds it.
        stream: the block's inputs; None for a backend that needs no calibration.
    Returns:
        full name of each quantized linear to its tensors, in the order of `stages`.
    """
    done: dict[str, QuantizedLinear] = {}
    for stage in stages:
        groups = [group for group in stage if any(f"{path}.{linear}" in chosen for linear in group.linears)]
        statistics: Mapping[LinearGroup, Statistics] = (
            stream.statistics(block, groups, path) if stream and groups else {}
        )
        for group in groups:
            names = [f"{path}.{linear}" for linear in group.linears if f"{path}.{linear}" in chosen]
            # Linears with the same settings go together: their rows are independent, and one pass serves them all.
            for settings in dict.fromkeys(chosen[name] for name in names):
                weights = {name: read_weight(name) for name in names if chosen[name] == settings}
                backend = BACKENDS[settings.backend]
                results = backend.quantize(weights, statistics.get(group), settings)
                for (name, weight), quantized in zip(weights.items(), results, strict=True):
                    done[name] = quantized
                    if stream is not None:
                        use_dequantized(
                            block, name.removeprefix(path + "."), quantized.tensors, backend, settings, weight.dtype
                        )
    return done


def use_dequantized(
    block: nn.Module,
    linear: str,
    tensors: Mapping[str, Tensor],
    backend: Backend,
    settings: LinearSettings,
    dtype: torch.dtype,
) -> None:
    """Let a float linear compute with the weight that its quantized tensors stand for."""
    weight = block.get_submodule(linear).weight
    assert isinstance(weight, Tensor)
    dequantized = backend.dequantize(tensors, (weight.shape[0], weight.shape[1]), backend.format(settings, dtype))
    with torch.no_grad():
        weight.copy_(dequantized)
