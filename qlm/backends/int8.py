"""Dynamic int8: weights int8 per output channel, activations quantized per token while running.

Stored as compressed-tensors `int-quantized` (transformers and vLLM read it): `weight` int8 [O, I], `weight_scale` fp32 [O, 1].
Linears with `input_16bit` take their input as it is; transformers reads those too, vLLM does not.
Activations are asymmetric (LLM.int8(), arXiv:2208.07339, table 1: 25.72 perplexity against 35.84 with symmetric ones on a 125M
model).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlm.backends.base import (
    Description,
    QuantizedLinear,
    Scheme,
    Statistics,
    TensorLayout,
    apply_keeping_dtypes,
    as_autocast,
    only_format,
    refuse_not_finite,
    refuse_singular,
    refused,
    relative_error,
    row_squares,
    with_heads,
)
from qlm.backends.target import bias_shift_of, target_of
from qlm.formats import int8
from qlm.formats.dtypes import dtype_name
from qlm.formats.int8 import Int8Format
from qlm.kernels import activations
from qlm.kernels.ops import int8_linear, int8_row_sum
from qlm.numerics.affine import quantize_weight_per_channel_absmax
from qlm.numerics.gptq import SingularHessian, factorize, row_losses
from qlm.numerics.int8 import outliers, quantize_int8_under, round_per_token
from qlm.recipe import LinearSettings

# Outliers of a linear's input that are on record by their numbers; how many there are is as well.
MOST_OUTLIERS = 32


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 weights and activations, or with activations as they are (`float_input`).

    Buffers: weight int8 [O, I]; weight_scale fp32 [O, 1]; row_sum int32 [O], derived and not saved.
    """

    weight: Tensor
    weight_scale: Tensor
    row_sum: Tensor

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        symmetric_input: bool,
        float_input: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.symmetric_input, self.float_input = symmetric_input, float_input
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("row_sum", int8_row_sum(weight), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        return apply_keeping_dtypes(self, fn)

    def forward(self, x: Tensor) -> Tensor:
        x = as_autocast(x)
        if self.float_input:
            return F.linear(x, torch.ops.qlm.int8_weight(self.weight, self.weight_scale, x.dtype), self.bias)
        return int8_linear(x, self.weight, self.weight_scale, self.row_sum, self.bias, self.symmetric_input)

    def activation_format(self) -> str:
        """What a forward pass does with activations: part of the format."""
        return activations.FLOAT if self.float_input else activations.PER_TOKEN

    def extra_repr(self) -> str:
        of_input = ", float_input=True" if self.float_input else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{of_input}"
        )


def _about_input(statistics: Statistics | None, settings: LinearSettings) -> dict[str, Any]:
    """Facts: what becomes of the input, and which of its features are outliers, the largest first."""
    facts: dict[str, Any] = {"activations": activations.FLOAT if settings.input_16bit else activations.PER_TOKEN}
    if statistics is not None and statistics.absmax is not None:
        ratio, features = outliers(statistics.absmax)
        facts |= {
            "largest_over_median_input": ratio,
            "outlier_inputs": len(features),
            "outliers": features[:MOST_OUTLIERS],
        }
    return facts


class Int8Backend:
    name = "int8"
    as_multiplied = staticmethod(round_per_token)

    def check(self, name: str, shape: tuple[int, int], settings: LinearSettings) -> None:
        """Any shape will do."""

    def quantize(
        self, weights: Mapping[str, Tensor], statistics: Statistics | None, settings: LinearSettings
    ) -> list[QuantizedLinear]:
        for name, weight in weights.items():
            refuse_not_finite(f"{name}.weight", weight)
        if statistics is None:
            return [self._plain(weight, **_about_input(None, settings)) for weight in weights.values()]
        names = ", ".join(weights)
        stacked = torch.cat([weight.float() for weight in weights.values()])
        hessian = statistics.hessian
        try:
            factor = factorize(hessian, torch.arange(len(hessian), device=hessian.device), settings.damp)
            target, strength = target_of(stacked, statistics, settings, factor)
            result = quantize_int8_under(
                target, hessian, damp=factor.damp, search=settings.compensate, compensate=settings.compensate,
                sweeps=settings.sweeps,
            )  # fmt: skip
        except SingularHessian as error:
            refuse_singular(names, error, settings)
            facts = {"why": str(error), **_about_input(statistics, settings)}
            return [self._plain(weight, **facts) for weight in weights.values()]
        except ValueError as error:
            raise refused(weights, error) from None
        loss, size = row_losses(target - result.codes * result.scale, factor), row_losses(target, factor)
        shift = bias_shift_of(stacked, result.codes * result.scale, statistics, settings)
        facts = {
            "method": "compensated" if settings.compensate else "absmax", "bits": 8, "damp": result.damp,
            "tokens": statistics.tokens, "target_shift": strength, "plain_rows": result.plain_rows,
            **_about_input(statistics, settings),
        }  # fmt: skip
        quantized, start = [], 0
        for weight in weights.values():
            rows = slice(start, start + len(weight))
            codes, scale = result.codes[rows].contiguous(), result.scale[rows].contiguous()
            quantized.append(
                QuantizedLinear(
                    {"weight": codes, "weight_scale": scale},
                    {**facts, "relative_error": relative_error(loss[rows], size[rows])},
                    None if shift is None else shift[rows],
                    loss[rows],
                    size[rows],
                )
            )
            start += len(weight)
        return quantized

    def _plain(self, weight: Tensor, **facts: Any) -> QuantizedLinear:
        codes, scale = quantize_weight_per_channel_absmax(weight)
        loss, size = row_squares(weight - codes * scale), row_squares(weight)
        return QuantizedLinear(
            {"weight": codes, "weight_scale": scale},
            {"method": "absmax", **facts, "bits": 8, "relative_error": relative_error(loss, size)},
            loss=loss,
            size=size,
        )

    def format(self, settings: LinearSettings, dtype: torch.dtype) -> Int8Format:
        return Int8Format(float_input=settings.input_16bit)

    def layout(self, shape: tuple[int, int], format: Int8Format) -> dict[str, TensorLayout]:
        return int8.layout(shape, format)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], format: Int8Format) -> Tensor:
        return tensors["weight"] * tensors["weight_scale"].float()

    def module(
        self,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        shape: tuple[int, int],
        format: Int8Format,
        dtype: torch.dtype,
    ) -> nn.Module:
        scale = tensors["weight_scale"].float()
        bias = None if bias is None else bias.to(dtype)
        return Int8Linear(tensors["weight"], scale, bias, format.symmetric_input, format.float_input)

    def describe(self, scheme: Scheme, left_out: Sequence[str], dtype: torch.dtype) -> Description:
        rounded = {name: how for name, how in scheme.items() if not how.float_input}
        as_it_is = [name for name in scheme if name not in rounded]
        groups: list[dict[str, Any]] = []
        if rounded:
            inputs = {**int8.INPUTS, "symmetric": only_format(rounded, "symmetric_input")}
            groups.append({"targets": ["Linear"], "weights": int8.WEIGHTS, "input_activations": inputs})
        if as_it_is:
            # Without the format of its own compressed-tensors would look for packed weights. A name goes before a class.
            targets = as_it_is if rounded else ["Linear"]
            groups.append({"targets": targets, "weights": int8.WEIGHTS, "format": int8.FORMAT})
        config = {
            "quant_method": "compressed-tensors",
            "format": int8.FORMAT,
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            "ignore": with_heads(left_out),
        }
        return Description(config, {})

    def read(self, config: Mapping[str, Any], linears: Sequence[str], dtype: torch.dtype) -> dict[str, Int8Format]:
        return int8.read(config, linears, dtype_name(dtype))
