"""How quantized weights lie in files: `FORMATS` is the registry, from a recipe's `quantize.backend` to the format's module.

Each module has the frozen dataclass that says how one linear is stored, `read` (from a `quantization_config` to that
dataclass for each linear), `layout` (the tensors that the file must hold), and what turns them into a kernel's
arguments. Nothing here imports torch, so that the CPU engine need not; backends/ quantizes and multiplies with torch.
quanto's files are known to quanto alone: see backends/quanto.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qlm.errors import DataError
from qlm.formats import gptq, int8, nf4
from qlm.formats.layout import TensorLayout


class Format(Protocol):
    """The interface of the modules."""

    def layout(self, shape: tuple[int, int], format: Any) -> dict[str, TensorLayout]: ...

    def read(self, config: Mapping[str, Any], linears: Sequence[str], dtype_name: str) -> Mapping[str, Any]: ...


FORMATS: dict[str, Format] = {"int8": int8, "nf4": nf4, "gptq": gptq}

# What a `quantization_config` calls the format.
QUANT_METHODS = {"compressed-tensors": "int8", "bitsandbytes": "nf4", "gptq": "gptq"}
# quanto's counterpart of a `quantization_config`, a file beside config.json.
QUANTO_MAP = "quanto_qmap.json"


def format_of(config: Mapping[str, Any]) -> str:
    """The name in `FORMATS` of what a folder with this `quantization_config` (or AutoGPTQ's `quantize_config.json`) holds.

    Raises:
        DataError: another quantization method.
    """
    # AutoGPTQ's first versions wrote neither key.
    method = config.get("quant_method") or config.get("method") or ("gptq" if "bits" in config else None)
    if not isinstance(method, str) or method not in QUANT_METHODS:
        raise DataError(
            f"quantization_config: quant_method {method!r}; qlm reads {', '.join(sorted(QUANT_METHODS))} "
            "(compressed-tensors int-quantized, bitsandbytes NF4, GPTQ) and quanto"
        )
    return QUANT_METHODS[method]


__all__ = ["FORMATS", "QUANTO_MAP", "QUANT_METHODS", "Format", "TensorLayout", "format_of"]
