"""NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): 4-bit normal-float codes, one absmax for 64 weights.

Stored as bitsandbytes' 4-bit safetensors, quantized by numerics/nf4.py to the same bytes, run by a Linear4bit of
bitsandbytes' (nf4_linear.py).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlm.backends.base import (
    Description,
    QuantizedLinear,
    Scheme,
    Statistics,
    TensorLayout,
    only_format,
    relative_error,
)
from qlm.backends.nf4_linear import make_nf4_linear
from qlm.errors import DataError, UsageError
from qlm.formats import nf4
from qlm.formats.dtypes import TORCH_NAMES, dtype_name
from qlm.formats.nf4 import BLOCK, NESTED_BLOCK, STATE, Nf4Format
from qlm.numerics.nf4 import (
    codebook,
    dequantize_nf4,
    double_dequantize,
    double_quantize,
    dynamic_map,
    quantize_nf4,
)
from qlm.numerics.packing import pack_nf4, unpack_nf4
from qlm.recipe import LinearSettings


def torch_name(dtype: torch.dtype) -> str:
    return TORCH_NAMES[dtype_name(dtype)]


def pack_state(state: Mapping[str, Any]) -> Tensor:
    """bitsandbytes' way to put JSON into a tensor: uint8, its UTF-8 bytes."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _bytes(state: Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


class Nf4Backend:
    name = "nf4"
    needs_calibration = False

    def check(self, name: str, shape: tuple[int, int], settings: LinearSettings) -> None:
        if shape[1] % BLOCK:
            raise UsageError(
                f"quantize.backend: nf4 stores blocks of {BLOCK} weights, and {name} has {shape[1]} inputs, not a multiple; "
                "leave the layer out with quantize.skip"
            )

    def quantize(
        self, weights: Mapping[str, Tensor], statistics: Statistics | None, settings: LinearSettings
    ) -> list[QuantizedLinear]:
        quantized = []
        for name, weight in weights.items():
            try:
                codes, absmax = quantize_nf4(weight.float(), BLOCK)
            except ValueError as error:
                raise DataError(f"{name}.weight: {error}; the checkpoint is damaged") from None
            state: dict[str, Any] = {
                "quant_type": "nf4", "blocksize": BLOCK, "dtype": torch_name(weight.dtype), "shape": list(weight.shape)
            }  # fmt: skip
            tensors = {"weight": pack_nf4(codes), "weight.quant_map": codebook()}
            if settings.double_quant:
                nested_codes, nested_absmax, offset = double_quantize(absmax)
                state |= {
                    "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(offset)
                }  # fmt: skip
                tensors |= {
                    "weight.absmax": nested_codes,
                    "weight.nested_absmax": nested_absmax,
                    "weight.nested_quant_map": dynamic_map(),
                }
            else:
                tensors["weight.absmax"] = absmax
            tensors[STATE] = pack_state(state)
            how = self.format(settings, weight.dtype)
            lost = relative_error(weight, self.dequantize(tensors, (weight.shape[0], weight.shape[1]), how))
            facts = {"method": "absmax", "bits": 4, "double_quant": settings.double_quant, "relative_error": lost}
            quantized.append(QuantizedLinear(tensors, facts))
        return quantized

    def format(self, settings: LinearSettings, dtype: torch.dtype) -> Nf4Format:
        return Nf4Format(settings.double_quant, torch_name(dtype))

    def layout(self, shape: tuple[int, int], format: Nf4Format) -> dict[str, TensorLayout]:
        return nf4.layout(shape, format)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], format: Nf4Format) -> Tensor:
        absmax = tensors["weight.absmax"]
        if format.double_quant:
            offset = nf4.nested_offset(nf4.unpack_state(_bytes(tensors[STATE])))
            absmax = double_dequantize(absmax, tensors["weight.nested_absmax"], offset)
        return dequantize_nf4(unpack_nf4(tensors["weight"]), absmax, shape, BLOCK)

    def module(
        self,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        shape: tuple[int, int],
        format: Nf4Format,
        dtype: torch.dtype,
    ) -> nn.Module:
        state = nf4.check_state(_bytes(tensors[STATE]), shape, format)
        nested_map = tensors["weight.nested_quant_map"].cpu().numpy() if format.double_quant else None
        nf4.check_tables(tensors["weight.quant_map"].cpu().numpy(), nested_map)
        # The quantization state says which dtype dequantizing gives; the model's own is the one that is wanted here.
        quantization_state = {
            **{
                name.removeprefix("weight."): tensor
                for name, tensor in tensors.items()
                if name not in ("weight", STATE)
            },
            STATE.removeprefix("weight."): pack_state({**state, "dtype": torch_name(dtype)}),
        }
        return make_nf4_linear(tensors["weight"], quantization_state, bias, shape, dtype)

    def describe(self, scheme: Scheme, left_out: Sequence[str], dtype: torch.dtype) -> Description:
        config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False,
            "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": only_format(scheme, "double_quant"), "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": list(left_out),
        }  # fmt: skip
        return Description(config, {})

    def read(self, config: Mapping[str, Any], linears: Sequence[str], dtype: torch.dtype) -> dict[str, Nf4Format]:
        return nf4.read(config, linears, dtype_name(dtype))
