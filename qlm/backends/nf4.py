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
    refuse_not_finite,
    refuse_singular,
    refused,
    relative_error,
    row_squares,
    with_heads,
)
from qlm.backends.nf4_linear import as_bytes, make_nf4_linear
from qlm.backends.target import bias_shift_of, target_of
from qlm.errors import UsageError
from qlm.formats import nf4
from qlm.formats.dtypes import TORCH_NAMES, dtype_name
from qlm.formats.nf4 import BLOCK, NESTED_BLOCK, STATE, Nf4Format
from qlm.numerics.gptq import SingularHessian, factorize, row_losses
from qlm.numerics.nf4 import (
    codebook,
    dequantize_nf4,
    double_dequantize,
    dynamic_map,
)
from qlm.numerics.nf4_search import Nf4Result, pivot_order, quantize_nf4_under
from qlm.numerics.packing import pack_nf4, unpack_nf4
from qlm.recipe import LinearSettings


def torch_name(dtype: torch.dtype) -> str:
    return TORCH_NAMES[dtype_name(dtype)]


def pack_state(state: Mapping[str, Any]) -> Tensor:
    """bitsandbytes' way to put JSON into a tensor: uint8, its UTF-8 bytes."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _bytes(state: Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _stored(result: Nf4Result, weight: Tensor) -> dict[str, Tensor]:
    """A linear's tensors as bitsandbytes stores them."""
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": torch_name(weight.dtype), "shape": list(weight.shape)
    }  # fmt: skip
    tensors = {"weight": pack_nf4(result.codes), "weight.quant_map": codebook()}
    if result.nested is not None:
        nested_codes, nested_absmax, offset = result.nested
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(offset)}
        tensors |= {
            "weight.absmax": nested_codes,
            "weight.nested_absmax": nested_absmax,
            "weight.nested_quant_map": dynamic_map(),
        }
    else:
        tensors["weight.absmax"] = result.absmax
    return tensors | {STATE: pack_state(state)}


class Nf4Backend:
    name = "nf4"
    as_multiplied = None

    def check(self, name: str, shape: tuple[int, int], settings: LinearSettings) -> None:
        if shape[1] % BLOCK:
            raise UsageError(
                f"quantize.backend: nf4 stores blocks of {BLOCK} weights, and {name} has {shape[1]} inputs, not a multiple; "
                "leave the layer out with quantize.skip"
            )

    def quantize(
        self, weights: Mapping[str, Tensor], statistics: Statistics | None, settings: LinearSettings
    ) -> list[QuantizedLinear]:
        for name, weight in weights.items():
            refuse_not_finite(f"{name}.weight", weight)
        names = ", ".join(weights)
        stacked = torch.cat([weight.float() for weight in weights.values()])
        hessian, factor, target = None, None, stacked
        facts: dict[str, Any] = {"method": "absmax", "bits": 4, "double_quant": settings.double_quant}
        try:
            if statistics is not None:
                order = pivot_order(statistics.hessian, settings.damp)
                hessian, factor = statistics.hessian, factorize(statistics.hessian, order, settings.damp)
                target, strength = target_of(stacked, statistics, settings, factor)
                facts |= {"damp": factor.damp, "tokens": statistics.tokens, "target_shift": strength}
        except SingularHessian as error:
            refuse_singular(names, error, settings)
            hessian, factor, target, statistics = None, None, stacked, None
            facts["why"] = str(error)
        if settings.compensate and factor is not None:
            facts["method"] = "compensated"
        quantized, rows = [], [len(weight) for weight in weights.values()]
        for (name, weight), part in zip(weights.items(), target.split(rows), strict=True):
            try:
                result = quantize_nf4_under(
                    part, hessian, factor,
                    search=settings.scale_search == "weighted",
                    compensate=settings.compensate and factor is not None,
                    sweeps=settings.sweeps if factor is not None else 0,
                    double_quant=settings.double_quant,
                )  # fmt: skip
            except ValueError as error:
                raise refused({name: weight}, error) from None
            tensors = _stored(result, weight)
            found = self.dequantize(tensors, (weight.shape[0], weight.shape[1]), self.format(settings, weight.dtype))
            shift = bias_shift_of(weight, found, statistics, settings)
            if factor is not None:
                loss, size = row_losses(part - found, factor), row_losses(part, factor)
            else:
                loss, size = row_squares(part - found), row_squares(part)
            own = {**facts, "relative_error": relative_error(loss, size)}
            quantized.append(QuantizedLinear(tensors, own, shift, loss, size))
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
        return dequantize_nf4(unpack_nf4(as_bytes(tensors["weight"])), absmax, shape, BLOCK)

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
        return make_nf4_linear(as_bytes(tensors["weight"]), quantization_state, bias, shape, dtype)

    def describe(self, scheme: Scheme, left_out: Sequence[str], dtype: torch.dtype) -> Description:
        config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False,
            "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": only_format(scheme, "double_quant"), "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": with_heads(left_out),
        }  # fmt: skip
        return Description(config, {})

    def read(self, config: Mapping[str, Any], linears: Sequence[str], dtype: torch.dtype) -> dict[str, Nf4Format]:
        return nf4.read(config, linears, dtype_name(dtype))
