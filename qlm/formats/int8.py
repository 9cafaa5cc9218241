"""Dynamic int8 as compressed-tensors `int-quantized` stores it: `weight` int8 [O, I], `weight_scale` [O, 1].

Folders with symmetric dynamic activations, as llm-compressor writes them, are read and run as what they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlm.errors import DataError
from qlm.formats.dtypes import FLOATS
from qlm.formats.layout import TensorLayout, is_head, names_in


@dataclass(frozen=True)
class Int8Format:
    symmetric_input: bool = False


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
    if config.get("format") != "int-quantized" or not isinstance(groups, Mapping) or len(groups) != 1:
        raise DataError(
            f"quantization_config: compressed-tensors format {config.get('format')!r} with config_groups {groups!r}; "
            "qlm reads 'int-quantized' with one group"
        )
    (group,) = groups.values()
    weights, inputs = (
        (group.get("weights"), group.get("input_activations")) if isinstance(group, Mapping) else (None, None)
    )
    if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping):
        raise DataError(f"quantization_config: config group {group!r}; expected 'weights' and 'input_activations'")
    for part, where in (("output_activations", group), ("kv_cache_scheme", config), ("transform_config", config)):
        if where.get(part):
            raise DataError(f"quantization_config: {part} {where[part]!r}; qlm's int8 has none")
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise DataError(f"quantization_config: sparsity_config {sparsity!r}; qlm reads dense weights")
    expected: list[tuple[str, Mapping[str, Any], dict[str, Any]]] = [
        (
            "weights",
            weights,
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
        ),
        ("input_activations", inputs, {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}),
    ]
    for part, found, wanted in expected:
        for key, value in wanted.items():
            if found.get(key) != value:
                raise DataError(f"quantization_config: {part}.{key} is {found.get(key)!r}; qlm's int8 has {value!r}")
    if group.get("targets") != ["Linear"]:
        raise DataError(
            f"quantization_config: targets {group.get('targets')!r}; qlm reads ['Linear'] with an ignore list"
        )
    ignored = set(names_in(config, "ignore"))
    if any(name.startswith("re:") for name in ignored):
        raise DataError("quantization_config: 'ignore' holds a regular expression; qlm reads plain module names")
    symmetric = inputs.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise DataError(f"quantization_config: input_activations.symmetric is {symmetric!r}; expected true or false")
    how = Int8Format(symmetric_input=symmetric)
    return {name: how for name in linears if name not in ignored and not is_head(name)}
