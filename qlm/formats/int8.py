"""Dynamic int8 as compressed-tensors `int-quantized` stores it: `weight` int8 [O, I], `weight_scale` [O, 1].

Folders with symmetric dynamic activations, as llm-compressor writes them, are read and run as what they are. Linears that take their
input as it is are a config group of their own, by name, without `input_activations`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlm.errors import DataError
from qlm.formats.dtypes import FLOATS
from qlm.formats.layout import TensorLayout, is_head, names_in

WEIGHTS: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
INPUTS: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FORMAT = "int-quantized"


@dataclass(frozen=True)
class Int8Format:
    """How a linear's input is multiplied: int8 with or without zero points, or, with `float_input`, as it is."""

    symmetric_input: bool = False
    float_input: bool = False


def layout(shape: tuple[int, int], format: Int8Format) -> dict[str, TensorLayout]:
    """The tensors that a file must hold for a linear [O, I], by their names after the linear's path."""
    return {
        "weight": TensorLayout(shape, frozenset({"I8"})),
        "weight_scale": TensorLayout((shape[0], 1), FLOATS),
    }


def read(config: Mapping[str, Any], linears: Sequence[str], dtype_name: str) -> dict[str, Int8Format]:
    """The format of each quantized linear of a folder that says `config`.

    Args:
        config: its `quantization_config`.
        linears: paths of the model's linears, the head's among them.
        dtype_name: of the checkpoint; int8 does not depend on it.

    Raises:
        DataError: the config asks for something that qlm does not do.
    """
    groups = config.get("config_groups")
    if config.get("format") != FORMAT or not isinstance(groups, Mapping) or not groups:
        raise DataError(
            f"quantization_config: compressed-tensors format {config.get('format')!r} with config_groups {groups!r}; "
            f"qlm reads {FORMAT!r} with one or more groups"
        )
    for part in ("kv_cache_scheme", "transform_config"):
        if config.get(part):
            raise DataError(f"quantization_config: {part} {config[part]!r}; qlm's int8 has none")
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise DataError(f"quantization_config: sparsity_config {sparsity!r}; qlm reads dense weights")
    ignored = set(names_in(config, "ignore"))
    if any(name.startswith("re:") for name in ignored):
        raise DataError("quantization_config: 'ignore' holds a regular expression; qlm reads plain module names")
    common: Int8Format | None = None
    named: dict[str, Int8Format] = {}
    for group in groups.values():
        how = _group_format(group)
        targets = group.get("targets")
        if targets == ["Linear"] and common is None:
            common = how
            continue
        names = names_in(group, "targets")
        unknown = [name for name in names if name not in linears or name in named]
        if not names or unknown:
            raise DataError(
                f"quantization_config: targets {targets!r}; qlm reads ['Linear'] in one group, with an ignore list, and plain names of "
                "the model's linears, each once, in others"
            )
        named |= dict.fromkeys(names, how)
    if common is None:
        raise DataError("quantization_config: no group of config_groups has the targets ['Linear']")
    return {name: named.get(name, common) for name in linears if name not in ignored and not is_head(name)}


def _group_format(group: Any) -> Int8Format:
    """What one of the `config_groups` says. Raises DataError for what qlm does not do."""
    weights, inputs = (
        (group.get("weights"), group.get("input_activations")) if isinstance(group, Mapping) else (None, None)
    )
    if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping | None):
        raise DataError(f"quantization_config: config group {group!r}; expected 'weights' and 'input_activations'")
    if group.get("output_activations"):
        raise DataError(f"quantization_config: output_activations {group['output_activations']!r}; qlm's int8 has none")
    if group.get("format") not in (None, FORMAT):
        raise DataError(f"quantization_config: a config group of format {group['format']!r}; qlm reads {FORMAT!r}")
    for part, found, wanted in (("weights", weights, WEIGHTS), ("input_activations", inputs, INPUTS)):
        for key, value in wanted.items():
            if found is not None and found.get(key) != value:
                raise DataError(f"quantization_config: {part}.{key} is {found.get(key)!r}; qlm's int8 has {value!r}")
    if inputs is None:
        return Int8Format(float_input=True)
    symmetric = inputs.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise DataError(f"quantization_config: input_activations.symmetric is {symmetric!r}; expected true or false")
    return Int8Format(symmetric_input=symmetric)
