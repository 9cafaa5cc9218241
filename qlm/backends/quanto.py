"""quanto: weights as optimum-quanto stores them, for comparison. Quantized and run by quanto itself; its only door is here.

Stored as quanto does: its tensors in safetensors, and `quanto_qmap.json`, which names the type of each quantized linear.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlm.backends.base import (
    Description,
    QuantizedLinear,
    Scheme,
    Statistics,
    TensorLayout,
    refuse_not_finite,
    relative_error,
    row_squares,
)
from qlm.errors import DataError, Unavailable
from qlm.formats import QUANTO_MAP
from qlm.formats.dtypes import FLOATS, dtype_name
from qlm.recipe import LinearSettings

QTYPES = {"qint8": 8, "qint4": 4, "qfloat8": 8}
# quanto names its fp8 type by the format.
QUANTO_NAMES = {"qint8": "qint8", "qint4": "qint4", "qfloat8": "qfloat8_e4m3fn"}
GROUP_SIZE = 128


@dataclass(frozen=True)
class QuantoFormat:
    qtype: str


def _quanto() -> Any:
    try:
        from optimum import quanto
    except ImportError:
        raise Unavailable(
            "backend quanto needs the package optimum-quanto; install qlm with its extra: qlm[quanto]"
        ) from None
    return quanto


def _empty(shape: tuple[int, int], bias: bool, qtype: str, dtype: torch.dtype) -> Any:
    quanto = _quanto()
    return quanto.QLinear(
        shape[1],
        shape[0],
        bias=bias,
        dtype=dtype,
        device="cpu",
        weights=quanto.qtypes[QUANTO_NAMES[qtype]],
        activations=None,
    )


class QuantoBackend:
    name = "quanto"
    as_multiplied = None

    def check(self, name: str, shape: tuple[int, int], settings: LinearSettings) -> None:
        _quanto()

    def quantize(
        self, weights: Mapping[str, Tensor], statistics: Statistics | None, settings: LinearSettings
    ) -> list[QuantizedLinear]:
        quantized = []
        for name, weight in weights.items():
            refuse_not_finite(f"{name}.weight", weight)
            module = _empty((weight.shape[0], weight.shape[1]), False, settings.qtype, weight.dtype)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.freeze()
            tensors = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
            loss, size = row_squares(weight - module.weight.dequantize().float()), row_squares(weight)
            error = relative_error(loss, size)
            if not math.isfinite(error):
                # quanto divides a row of zeros by its scale of zero; in 8-bit floats the result stays NaN.
                raise DataError(
                    f"{name}.weight: quanto's {settings.qtype} makes NaN or infinite values of it (it has rows of zeros, or "
                    "too small or large ones); leave the layer out with quantize.skip"
                )
            facts = {"method": settings.qtype, "bits": QTYPES[settings.qtype], "relative_error": error}
            quantized.append(QuantizedLinear(tensors, facts, loss=loss, size=size))
        return quantized

    def format(self, settings: LinearSettings, dtype: torch.dtype) -> QuantoFormat:
        return QuantoFormat(settings.qtype)

    def layout(self, shape: tuple[int, int], format: QuantoFormat) -> dict[str, TensorLayout]:
        # Which tensors quanto writes is quanto's own business: ask it.
        module = _empty(shape, False, format.qtype, torch.float16)
        module.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float16), requires_grad=False)
        module.freeze()
        return {
            name: TensorLayout(
                tuple(tensor.shape), FLOATS if tensor.dtype == torch.float16 else frozenset({dtype_name(tensor.dtype)})
            )
            for name, tensor in module.state_dict().items()
        }

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], format: QuantoFormat) -> Tensor:
        module: Any = self.module(tensors, None, shape, format, torch.float32)
        return module.weight.dequantize().float()

    def module(
        self,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        shape: tuple[int, int],
        format: QuantoFormat,
        dtype: torch.dtype,
    ) -> nn.Module:
        module = _empty(shape, bias is not None, format.qtype, dtype)
        # quanto computes in the dtype of its scales and shifts.
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor
            for name, tensor in tensors.items()
        }
        if bias is not None:
            state["bias"] = bias.to(dtype)
        module.load_state_dict(state, assign=True)
        module.weight.requires_grad_(False)
        return module

    def describe(self, scheme: Scheme, left_out: Sequence[str], dtype: torch.dtype) -> Description:
        linears = {name: {"weights": QUANTO_NAMES[how.qtype], "activations": "none"} for name, how in scheme.items()}
        return Description(None, {QUANTO_MAP: linears})

    def read(self, config: Mapping[str, Any], linears: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
        types = {stored: name for name, stored in QUANTO_NAMES.items()}
        scheme = {}
        for name, entry in config.items():
            stored: Any = entry.get("weights") if isinstance(entry, Mapping) else None
            known = isinstance(stored, str) and stored in types
            if name not in linears or not known or entry.get("activations", "none") != "none":
                raise DataError(
                    f"{QUANTO_MAP}: {name!r}: {entry!r}; qlm reads linears of the model with weights {sorted(types)} and no "
                    "quantized activations"
                )
            scheme[name] = QuantoFormat(types[stored])
        return scheme
