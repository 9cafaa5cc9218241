"""The element types of checkpoint files, by their safetensors names, and what each is called elsewhere.

Everything that describes a file uses these names, so that a checkpoint can be opened without torch; torch's own types
appear only where tensors are made.
"""

from typing import TYPE_CHECKING

import numpy as np

# At run time torch takes seconds to import, and only those who make tensors need it.
if TYPE_CHECKING:
    import torch

# Bytes of an element. F8_E4M3 is there for quanto's qfloat8.
DTYPES: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
# What weights that are not quantized may be.
FLOATS = frozenset({"F16", "BF16", "F32"})

# torch's names, without "torch."; bitsandbytes writes them into its files.
TORCH_NAMES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_FROM_TORCH = {torch_name: name for name, torch_name in TORCH_NAMES.items()}

# numpy has neither bfloat16 nor 8-bit floats: those come as unsigned integers with the same bits.
NUMPY_DTYPES: dict[str, np.dtype] = {
    name: np.dtype({"BF16": "uint16", "F8_E4M3": "uint8"}.get(name, TORCH_NAMES[name])) for name in DTYPES
}


def torch_dtype(name: str) -> "torch.dtype":
    """torch's type of that safetensors name."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: "torch.dtype") -> str:
    """The safetensors name of torch's type. Raises KeyError for a type that no checkpoint of these families has."""
    return _FROM_TORCH[str(dtype).removeprefix("torch.")]


def to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a file as float32, in fresh memory.

    Args:
        values: as `NUMPY_DTYPES` has them: of bfloat16 the bits, as uint16.
        dtype: F32, F16 or BF16.
    """
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    assert dtype in FLOATS, dtype
    return values.astype(np.float32)
