"""NF4 as bitsandbytes' 4-bit safetensors store it: two codes in a byte, one absmax for 64 weights, which may be coded
with 8 bits itself (double quantization), the tables of both codes, and a small JSON object in a tensor of bytes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlm.errors import DataError
from qlm.formats.dtypes import TORCH_NAMES
from qlm.formats.layout import TensorLayout, is_head, names_in

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmax values that share one nested absmax
STATE = "weight.quant_state.bitsandbytes__nf4"
# The longest state that bitsandbytes writes is below 300 bytes.
STATE_LIMIT = 4096
# How far a stored dynamic map may be from bitsandbytes': its own versions differ in the last bit.
MAP_TOLERANCE = 1e-6

# Quantiles of the standard normal distribution, normalised to [-1, 1], with an exact zero: bitsandbytes
# `functional.py`, `get_4bit_type`. Files store this table, but every kernel has it built in. The test of
# numerics/nf4.py derives it anew.
CODEBOOK: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


# What the packed bytes may be held as (`bnb_4bit_quant_storage`), by safetensors' names and with the bytes of one element. Floats are
# for FSDP, which shards no integers; the bytes are the same.
STORAGES: dict[str, tuple[str, int]] = {
    "uint8": ("U8", 1),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "float32": ("F32", 4),
}


@dataclass(frozen=True)
class Nf4Format:
    """`dtype` is that of the weights before quantization, as bitsandbytes names it; `storage` a name in STORAGES."""

    double_quant: bool
    dtype: str
    storage: str = "uint8"


@dataclass(frozen=True)
class Nf4Weights:
    """What a kernel needs of one linear [O, I]. Either `absmax` is there, or all of the nested statistics, where

        absmax[b] = nested_code[absmax_code[b]] * nested_absmax[b // nested_block] + nested_offset

    Attributes:
        weight: uint8 [O * I / 2, 1], the file's bytes.
        block: weights of the flattened row-major matrix that share an absmax; B blocks in all.
        absmax: float32 [B].
        absmax_code: uint8 [B].
        nested_code: float32 [256].
        nested_absmax: float32 [ceil(B / nested_block)].
    """

    weight: np.ndarray
    block: int
    absmax: np.ndarray | None = None
    absmax_code: np.ndarray | None = None
    nested_code: np.ndarray | None = None
    nested_absmax: np.ndarray | None = None
    nested_block: int = NESTED_BLOCK
    nested_offset: float = 0.0


def layout(shape: tuple[int, int], format: Nf4Format) -> dict[str, TensorLayout]:
    """The tensors that a file must hold for a linear [O, I], by their names after the linear's path."""
    weights = shape[0] * shape[1]
    blocks = -(-weights // BLOCK)
    bytes_, floats = frozenset({"U8"}), frozenset({"F32"})
    storage, size = STORAGES[format.storage]
    tensors = {
        "weight": TensorLayout((-(-weights // (2 * size)), 1), frozenset({storage})),
        "weight.absmax": TensorLayout((blocks,), bytes_ if format.double_quant else floats),
        "weight.quant_map": TensorLayout((16,), floats),
        STATE: TensorLayout((-1,), bytes_),
    }
    if format.double_quant:
        tensors["weight.nested_absmax"] = TensorLayout((-(-blocks // NESTED_BLOCK),), floats)
        tensors["weight.nested_quant_map"] = TensorLayout((256,), floats)
    return tensors


def read(config: Mapping[str, Any], linears: Sequence[str], dtype_name: str) -> dict[str, Nf4Format]:
    """The format of each quantized linear of a folder that says `config`.

    Args:
        config: its `quantization_config`.
        linears: paths of the model's linears, the head's among them.
        dtype_name: of the tensors that are not quantized, a safetensors name.

    Raises:
        DataError: the config asks for something that qlm does not do.
    """
    if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        raise DataError(
            "quantization_config: bitsandbytes without load_in_4bit; qlm reads NF4 (LLM.int8() folders can be quantized "
            "anew from the float checkpoint with backend int8)"
        )
    quant_type = config.get("bnb_4bit_quant_type", "fp4")
    if quant_type != "nf4":
        raise DataError(f"quantization_config: bnb_4bit_quant_type is {quant_type!r}; qlm reads 'nf4'")
    storage = config.get("bnb_4bit_quant_storage", "uint8")
    if not isinstance(storage, str) or storage not in STORAGES:
        raise DataError(
            f"quantization_config: bnb_4bit_quant_storage is {storage!r}; qlm reads {', '.join(map(repr, STORAGES))}"
        )
    skipped = names_in(config, "llm_int8_skip_modules")
    double_quant = config.get("bnb_4bit_use_double_quant", False)
    if not isinstance(double_quant, bool):
        raise DataError(f"quantization_config: bnb_4bit_use_double_quant is {double_quant!r}; expected true or false")
    how = Nf4Format(double_quant, TORCH_NAMES[dtype_name], storage)
    return {
        name: how
        for name in linears
        if not is_head(name)
        and not any(name == skip or name.startswith(skip + ".") or name.endswith("." + skip) for skip in skipped)
    }


def unpack(tensors: Mapping[str, np.ndarray], shape: tuple[int, int], format: Nf4Format) -> Nf4Weights:
    """What a kernel needs of a linear [O, I], from the tensors of its `layout`.

    Raises:
        DataError: the tables or the quantization state are not those of NF4 with blocks of 64; without the linear's
            path, which the caller knows.
    """
    state = check_state(tensors[STATE].tobytes(), shape, format)
    check_tables(tensors["weight.quant_map"], tensors.get("weight.nested_quant_map"))
    weight = tensors["weight"]
    if weight.dtype != np.uint8:
        weight = weight.reshape(-1).view(np.uint8)[:, None]
    if not format.double_quant:
        return Nf4Weights(weight, BLOCK, absmax=tensors["weight.absmax"])
    return Nf4Weights(
        weight,
        BLOCK,
        absmax_code=tensors["weight.absmax"],
        nested_code=tensors["weight.nested_quant_map"],
        nested_absmax=tensors["weight.nested_absmax"],
        nested_offset=nested_offset(state),
    )


def unpack_state(data: bytes) -> dict[str, Any]:
    """The JSON object in the bytes of a state tensor. Raises DataError where there is none."""
    try:
        if len(data) > STATE_LIMIT:
            raise ValueError(f"{len(data)} bytes")
        state = json.loads(data)
        if not isinstance(state, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{STATE}: not a bitsandbytes quantization state: {error}") from None
    return state


def check_state(data: bytes, shape: tuple[int, int], format: Nf4Format) -> dict[str, Any]:
    """The quantization state of a linear [O, I], which must say what its `format` and config say."""
    state = unpack_state(data)
    expected: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
    if format.double_quant:
        expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    for key, value in expected.items():
        if state.get(key) != value:
            raise DataError(f"{STATE}: {key} is {state.get(key)!r}, expected {value!r}")
    if format.double_quant:
        nested_offset(state)
    return state


def nested_offset(state: Mapping[str, Any]) -> float:
    """What is added to every nested absmax."""
    offset = state.get("nested_offset")
    if not isinstance(offset, (int, float)) or not abs(offset) <= float(np.finfo(np.float32).max):
        raise DataError(f"{STATE}: nested_offset is {offset!r}, expected a number")
    return float(offset)


def check_tables(quant_map: np.ndarray, nested_quant_map: np.ndarray | None) -> None:
    """Refuse tables of codes other than bitsandbytes' own: kernels have them built in and ignore the stored ones."""
    if nested_quant_map is not None and not np.allclose(nested_quant_map, dynamic_map(), rtol=0, atol=MAP_TOLERANCE):
        raise DataError("weight.nested_quant_map: not bitsandbytes' dynamic map; it was made by another method")
    if not np.array_equal(quant_map, np.array(CODEBOOK, np.float32)):
        raise DataError("weight.quant_map: not the NF4 table; it was made by another method")


def dynamic_map() -> np.ndarray:
    """The 8-bit dynamic map to within the last bit, float32 [256]; numerics/nf4.py has it with bitsandbytes' own
    rounding, and describes it.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1.0, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * math.pow(10.0, exponent - 6)
        values += [*middles, *-middles]
    return np.array(sorted(values), np.float32)
