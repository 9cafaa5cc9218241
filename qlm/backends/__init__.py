"""The weight backends. `BACKENDS` is the registry: a recipe's `quantize.backend` to the backend."""

from collections.abc import Mapping
from typing import Any

from qlm.backends.base import Backend, Description, QuantizedLinear, Scheme, Statistics, TensorLayout
from qlm.backends.gptq import GptqBackend
from qlm.backends.int8 import Int8Backend
from qlm.backends.nf4 import Nf4Backend
from qlm.backends.quanto import QuantoBackend
from qlm.errors import DataError

BACKENDS: dict[str, Backend] = {
    "int8": Int8Backend(),
    "nf4": Nf4Backend(),
    "gptq": GptqBackend(),
    "quanto": QuantoBackend(),
}

# What a `quantization_config` calls the backend that reads it.
QUANT_METHODS = {"compressed-tensors": "int8", "bitsandbytes": "nf4", "gptq": "gptq"}


def backend_of(config: Mapping[str, Any]) -> Backend:
    """The backend that reads a folder with this `quantization_config` (or AutoGPTQ's `quantize_config.json`).

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
    return BACKENDS[QUANT_METHODS[method]]


__all__ = [
    "BACKENDS",
    "Backend",
    "Description",
    "QuantizedLinear",
    "Scheme",
    "Statistics",
    "TensorLayout",
    "backend_of",
]
