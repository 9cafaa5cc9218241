"""Dynamic int8: weights int8 per output channel, activations quantized per token while running.

Stored as compressed-tensors `int-quantized` (transformers and vLLM read it): `weight` int8 [O, I], `weight_scale` fp32 [O, 1].
Activations are asymmetric (LLM.int8(), arXiv:2208.07339, table 1: 25.72 perplexity against 35.84 with symmetric ones on a 125M
model). Folders with symmetric dynamic activations, as llm-compressor writes them, are read and run as what they are.
"""

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
    apply_keeping_dtypes,
    is_head,
    names_in,
    only_format,
    relative_error,
)
from qlm.errors import DataError
from qlm.kernels.ops import int8_linear, int8_row_sum
from qlm.numerics.affine import quantize_weight_per_channel_absmax
from qlm.recipe import LinearSettings


@dataclass(frozen=True)
class Int8Format:
    symmetric_input: bool = False


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 weights and activations.

    Buffers: weight int8 [O, I]; weight_scale fp32 [O, 1]; row_sum int32 [O], derived and not saved.
    """

    weight: Tensor
    weight_scale: Tensor
    row_sum: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, symmetric_input: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.symmetric_input = symmetric_input
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("row_sum", int8_row_sum(weight), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        return apply_keeping_dtypes(self, fn)

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.weight_scale, self.row_sum, self.bias, self.symmetric_input)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Backend:
    name = "int8"
    needs_calibration = False

    def check(self, name: str, shape: tuple[int, int], settings: LinearSettings) -> None:
        """Any shape will do."""

    def quantize(
        self, weights: Mapping[str, Tensor], statistics: Statistics | None, settings: LinearSettings
    ) -> list[QuantizedLinear]:
        quantized = []
        for name, weight in weights.items():
            try:
                codes, scale = quantize_weight_per_channel_absmax(weight)
            except ValueError as error:
                raise DataError(f"{name}.weight: {error}; the checkpoint is damaged") from None
            facts = {"method": "absmax", "bits": 8, "relative_error": relative_error(weight, codes * scale)}
            quantized.append(QuantizedLinear({"weight": codes, "weight_scale": scale}, facts))
        return quantized

    def format(self, settings: LinearSettings, dtype: torch.dtype) -> Int8Format:
        return Int8Format()

    def layout(self, shape: tuple[int, int], format: Int8Format) -> dict[str, TensorLayout]:
        scales = frozenset({torch.float32, torch.float16, torch.bfloat16})
        return {
            "weight": TensorLayout(shape, frozenset({torch.int8})),
            "weight_scale": TensorLayout((shape[0], 1), scales),
        }

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
        return Int8Linear(tensors["weight"], scale, None if bias is None else bias.to(dtype), format.symmetric_input)

    def describe(self, scheme: Scheme, left_out: Sequence[str], dtype: torch.dtype) -> Description:
        weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
        inputs = {
            "num_bits": 8, "type": "int", "strategy": "token", "dynamic": True,
            "symmetric": only_format(scheme, "symmetric_input"),
        }  # fmt: skip
        config = {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
            "ignore": list(left_out),
        }
        return Description(config, {})

    def read(self, config: Mapping[str, Any], linears: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
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
                    raise DataError(
                        f"quantization_config: {part}.{key} is {found.get(key)!r}; qlm's int8 has {value!r}"
                    )
        if group.get("targets") != ["Linear"]:
            raise DataError(
                f"quantization_config: targets {group.get('targets')!r}; qlm reads ['Linear'] with an ignore list"
            )
        ignored = set(names_in(config, "ignore"))
        if any(name.startswith("re:") for name in ignored):
            raise DataError("quantization_config: 'ignore' holds a regular expression; qlm reads plain module names")
        symmetric = inputs.get("symmetric", True)
        if not isinstance(symmetric, bool):
            raise DataError(
                f"quantization_config: input_activations.symmetric is {symmetric!r}; expected true or false"
            )
        how = Int8Format(symmetric_input=symmetric)
        return {name: how for name in linears if name not in ignored and not is_head(name)}
