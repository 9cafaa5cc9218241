"""GPTQ as AutoGPTQ and GPTQModel store it: `qweight`, `qzeros`, `scales`, `g_idx` (numerics/packing.py has the bytes).

v1 and v2 are read. Settings of single linears are GPTQModel's `dynamic` rules.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlm.errors import DataError
from qlm.formats.dtypes import FLOATS
from qlm.formats.layout import TensorLayout, in_block

BITS = (2, 3, 4, 8)
# Rules come from files, and Python's matcher backtracks: for ever over a repeated group such as (a+)+ or (.|.)*, and by
# the power of their number over other repetitions.
LONGEST_RULE = 500
REPEATED_GROUP = re.compile(r"\)[+*{?]")
MOST_REPEATS = 4


@dataclass(frozen=True)
class GptqFormat:
    """`group_size` -1 is one group a row; `v2`: zero points are stored as they are, not less one."""

    bits: int
    group_size: int
    symmetric: bool = True
    desc_act: bool = False
    v2: bool = False
    damp: float = 0.01


@dataclass(frozen=True)
class GptqWeights:
    """What a kernel needs of one linear [O, I].

    Attributes:
        qweight: int32 [I bits / 32, O], as the file has it.
        scales: [G, O], as the file has it (bfloat16 as uint16).
        zero_point: uint8 [G, O], from 0 to 2^bits - 1.
        group_size: in features that share a scale: I / G.
        order: None when in feature i belongs to group i // group_size. Else int32 [I]: a permutation that sorts the in
            features by group, those of one group in their own order, so that position i of the sorted ones belongs to
            group i // group_size and holds in feature order[i].
    """

    qweight: np.ndarray
    scales: np.ndarray
    zero_point: np.ndarray
    group_size: int
    order: np.ndarray | None


def group_size_of(format: Any, inputs: int) -> int:
    """In features in a group, of a format or of a recipe's settings, for a linear of that many."""
    return inputs if format.group_size == -1 else format.group_size


def layout(shape: tuple[int, int], format: GptqFormat) -> dict[str, TensorLayout]:
    """The tensors that a file must hold for a linear [O, I], by their names after the linear's path."""
    O, I = shape
    groups, words = -(-I // group_size_of(format, I)), frozenset({"I32"})
    return {
        "qweight": TensorLayout((I * format.bits // 32, O), words),
        "qzeros": TensorLayout((groups, O * format.bits // 32), words),
        "scales": TensorLayout((groups, O), FLOATS),
        "g_idx": TensorLayout((I,), words),
    }


def read(config: Mapping[str, Any], linears: Sequence[str], dtype_name: str) -> dict[str, GptqFormat]:
    """The format of each quantized linear of a folder that says `config`.

    Args:
        config: its `quantization_config`, or AutoGPTQ's `quantize_config.json`.
        linears: paths of the model's linears; only those in blocks are quantized.
        dtype_name: of the checkpoint; GPTQ does not depend on it.

    Raises:
        DataError: the config asks for something that qlm does not do.
    """
    stored = config.get("checkpoint_format") or config.get("format") or "gptq"
    if stored not in ("gptq", "gptq_v2"):
        raise DataError(f"quantization_config: checkpoint_format {stored!r}; qlm reads 'gptq' and 'gptq_v2'")
    if config.get("pack_dtype", "int32") != "int32":
        raise DataError(f"quantization_config: pack_dtype {config['pack_dtype']!r}; qlm reads 'int32'")
    if config.get("lm_head"):
        raise DataError("quantization_config: a quantized lm_head; qlm reads folders whose head is in 16 or 32 bits")
    rules = config.get("dynamic") or {}
    if not isinstance(rules, Mapping) or not all(c is None or isinstance(c, Mapping) for c in rules.values()):
        raise DataError(f"quantization_config: dynamic {rules!r}; expected rules with a mapping each")
    suffixes = _suffixes(config.get("modules_in_block_to_quantize"))
    scheme: dict[str, GptqFormat] = {}
    # GPTQ tools quantize inside blocks only: no heads, and none of OPT's projections around the blocks.
    for name in filter(in_block, linears):
        how: dict[str, Any] | None = dict(config)
        if suffixes is not None and not any(name.endswith("." + suffix) for suffix in suffixes):
            how = None
        for rule, changes in rules.items():
            if _matches(rule, name):
                how = None if rule.startswith("-:") or how is None else {**how, **(changes or {})}
                break  # GPTQModel takes the first rule that matches
        if how is not None:
            scheme[name] = _read_format(how, stored == "gptq_v2")
    return scheme


def _matches(rule: str, name: str) -> bool:
    pattern = rule.removeprefix("+:").removeprefix("-:")
    repeats = sum(map(pattern.count, "+*{"))
    if len(pattern) > LONGEST_RULE or repeats > MOST_REPEATS or REPEATED_GROUP.search(pattern):
        raise DataError(
            f"quantization_config: dynamic rule {rule!r} could take for ever to match; qlm takes rules of at most "
            f"{LONGEST_RULE} characters and {MOST_REPEATS} repetitions, none of them of a group"
        )
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise DataError(f"quantization_config: dynamic rule {rule!r} is no regular expression: {error}") from None


def _read_format(values: Mapping[str, Any], v2: bool) -> GptqFormat:
    bits: Any = values.get("bits")
    group_size: Any = values.get("group_size")
    whole = type(bits) is int and type(group_size) is int  # no 4.0, no true
    if not whole or bits not in BITS or not (group_size == -1 or group_size >= 8):
        raise DataError(
            f"quantization_config: bits {bits!r} with group_size {group_size!r}; qlm reads bits {BITS} with a group "
            "size of -1 or at least 8"
        )
    return GptqFormat(bits, group_size, bool(values.get("sym", True)), bool(values.get("desc_act", False)), v2)


def _suffixes(inside: Any) -> set[str] | None:
    """The paths in a block that `modules_in_block_to_quantize` names, in one list or in a list for each stage; None
    means all.
    """
    if not inside:
        return None
    if isinstance(inside, list):
        paths = [path for stage in inside for path in (stage if isinstance(stage, list) else [stage])]
        if all(isinstance(path, str) for path in paths):
            return set(paths)
    raise DataError(f"quantization_config: modules_in_block_to_quantize {inside!r}; expected lists of module names")


def unpack(tensors: Mapping[str, np.ndarray], shape: tuple[int, int], format: GptqFormat) -> GptqWeights:
    """What a kernel needs of a linear [O, I], from the tensors of its `layout`.

    Raises:
        DataError: g_idx names a group that is not there, or gives the groups different sizes; without the linear's
            path, which the caller knows.
    """
    inputs = shape[1]
    groups = tensors["scales"].shape[0]
    order = order_of(tensors["g_idx"], groups)
    zero_point = decode_zero_points(tensors["qzeros"], format.bits, format.v2)
    return GptqWeights(tensors["qweight"], tensors["scales"], zero_point, inputs // groups, order)


def decode_zero_points(qzeros: np.ndarray, bits: int, v2: bool) -> np.ndarray:
    """The zero points of a `qzeros`; the twin of `decode_zero_points` in numerics/packing.py, which describes the bytes.

    Args:
        qzeros: int32 [G, O * bits / 32].
        bits: 2, 3, 4 or 8.
        v2: they are stored as they are; else one is added to each field, and masked, as AutoGPTQ does.

    Returns:
        uint8 [G, O], from 0 to 2^bits - 1.
    """
    # The words of a row are one stream of bits, lowest first, in which so many bytes hold 8 fields.
    stored = np.ascontiguousarray(qzeros, "<i4").view(np.uint8)
    if bits < 8:
        octets = stored.reshape(len(qzeros), -1, bits).astype(np.uint32)
        joined = (octets << (8 * np.arange(bits, dtype=np.uint32))).sum(axis=2, dtype=np.uint32)
        fields = joined[:, :, None] >> (bits * np.arange(8, dtype=np.uint32))
        stored = fields.astype(np.uint8).reshape(len(qzeros), -1)
    return (stored + np.uint8(0 if v2 else 1)) & np.uint8(2**bits - 1)


def order_of(g_idx: np.ndarray, groups: int) -> np.ndarray | None:
    """The order of in features that makes each group's adjacent, or None where they are already: see `GptqWeights`.

    Args:
        g_idx: int32 [I], the group of each in feature.
        groups: G.

    Raises:
        DataError: a group that is not there, or groups of different sizes. Tools write the latter when G does not
            divide I; `group_size` of a kernel is one number.
    """
    check_groups(int(g_idx.min()), int(g_idx.max()), groups)
    inputs = g_idx.shape[0]
    sizes = np.bincount(g_idx, minlength=groups)
    if (sizes * groups != inputs).any():
        odd = int(np.argmax(sizes * groups != inputs))
        raise DataError(
            f"g_idx gives group {odd} {sizes[odd]} of {inputs} in features; the CPU engine needs {groups} groups of equal "
            "size; run it with --runtime transformers"
        )
    if (np.diff(g_idx) >= 0).all():
        return None
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def check_groups(lowest: int, highest: int, groups: int) -> None:
    """Refuse a g_idx that goes from `lowest` to `highest`: it is used as an address, and a value out of range would read
    somebody else's memory in a kernel.
    """
    if lowest < 0 or highest >= groups:
        raise DataError(f"g_idx holds {lowest} to {highest}, but there are {groups} groups")
