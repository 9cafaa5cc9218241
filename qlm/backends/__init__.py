"""The weight backends. `BACKENDS` is the registry: a recipe's `quantize.backend` to the backend."""

from collections.abc import Mapping
from typing import Any

from qlm.backends.base import Backend, Description, QuantizedLinear, Scheme, Statistics, TensorLayout
from qlm.backends.gptq import GptqBackend
from qlm.backends.int8 import Int8Backend
from qlm.backends.nf4 import Nf4Backend
from qlm.backends.quanto import QuantoBackend
from qlm.formats import format_of

BACKENDS: dict[str, Backend] = {
    "int8": Int8Backend(),
    "nf4": Nf4Backend(),
    "gptq": GptqBackend(),
    "quanto": QuantoBackend(),
}


def backend_of(config: Mapping[str, Any]) -> Backend:
    """The backend that reads a folder with this `quantization_config` (or AutoGPTQ's `quantize_config.json`).

    Raises:
        DataError: another quantization method.
    """
    return BACKENDS[format_of(config)]


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
