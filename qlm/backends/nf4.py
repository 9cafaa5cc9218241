"""NF4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): 4-bit normal-float codes, one absmax for 64 weights.

Stored as bitsandbytes' 4-bit safetensors, quantized by numerics/nf4.py to the same bytes, run by bitsandbytes' Linear4bit, so that
PEFT and everything else that knows that class works. This module is the project's only door to bitsandbytes.

On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks a Linear4bit at its first forward pass and rounds every absmax to bf16 (a relative
error of up to 0.4 % in each block, silently, and lossy when saved again). Modules made here do not: they compute from the
file's absmax.
"""

import json
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
    is_head,
    names_in,
    only_format,
    relative_error,
)
from qlm.errors import DataError, UsageError
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

BLOCK = 64
NESTED_BLOCK = 256
STATE = "weight.quant_state.bitsandbytes__nf4"
# The longest state that bitsandbytes writes is below 300 bytes.
STATE_LIMIT = 4096


@dataclass(frozen=True)
class Nf4Format:
    """`dtype` is that of the weights before quantization, as bitsandbytes names it."""

    double_quant: bool
    dtype: str


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pack_state(state: Mapping[str, Any]) -> Tensor:
    """bitsandbytes' way to put JSON into a tensor: uint8, its UTF-8 bytes."""
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def unpack_state(tensor: Tensor) -> dict[str, Any]:
    """The JSON object in a state tensor. Raises DataError where there is none."""
    try:
        if tensor.numel() > STATE_LIMIT:
            raise ValueError(f"{tensor.numel()} bytes")
        state = json.loads(bytes(tensor.tolist()))
        if not isinstance(state, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{STATE}: not a bitsandbytes quantization state: {error}") from None
    return state


def _nested_offset(state: Mapping[str, Any]) -> float:
    offset = state.get("nested_offset")
    if not isinstance(offset, (int, float)) or not abs(offset) <= torch.finfo(torch.float32).max:
        raise DataError(f"{STATE}: nested_offset is {offset!r}, expected a number")
    return float(offset)


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
                "quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype_name(weight.dtype), "shape": list(weight.shape)
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
        return Nf4Format(settings.double_quant, dtype_name(dtype))

    def layout(self, shape: tuple[int, int], format: Nf4Format) -> dict[str, TensorLayout]:
        weights = shape[0] * shape[1]
        blocks = -(-weights // BLOCK)
        bytes_, floats = frozenset({torch.uint8}), frozenset({torch.float32})
        layout = {
            "weight": TensorLayout((-(-weights // 2), 1), bytes_),
            "weight.absmax": TensorLayout((blocks,), bytes_ if format.double_quant else floats),
            "weight.quant_map": TensorLayout((16,), floats),
            STATE: TensorLayout((-1,), bytes_),
        }
        if format.double_quant:
            layout["weight.nested_absmax"] = TensorLayout((-(-blocks // NESTED_BLOCK),), floats)
            layout["weight.nested_quant_map"] = TensorLayout((256,), floats)
        return layout

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], format: Nf4Format) -> Tensor:
        absmax = tensors["weight.absmax"]
        if format.double_quant:
            offset = _nested_offset(unpack_state(tensors[STATE]))
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
        import bitsandbytes as bnb

        state = unpack_state(tensors[STATE])
        expected = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
        if format.double_quant:
            expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        for key, value in expected.items():
            if state.get(key) != value:
                raise DataError(f"{STATE}: {key} is {state.get(key)!r}, expected {value!r}")
        if format.double_quant:
            _nested_offset(state)
            if not torch.allclose(tensors["weight.nested_quant_map"].cpu(), dynamic_map(), rtol=0, atol=1e-6):
                raise DataError("weight.nested_quant_map: not bitsandbytes' dynamic map; it was made by another method")
        if not torch.equal(tensors["weight.quant_map"].cpu(), codebook()):
            # bitsandbytes' kernels ignore the stored table, so another one would be silently wrong.
            raise DataError("weight.quant_map: not the NF4 table; it was made by another method")
        # The quantization state says which dtype dequantizing gives; the model's own is the one that is wanted here.
        packed = {
            **{
                name.removeprefix("weight."): tensor
                for name, tensor in tensors.items()
                if name not in ("weight", STATE)
            },
            STATE.removeprefix("weight."): pack_state({**state, "dtype": dtype_name(dtype)}),
        }
        module = bnb.nn.Linear4bit(
            shape[1], shape[0], bias=bias is not None, compute_dtype=dtype, compress_statistics=format.double_quant,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        module.weight = bnb.nn.Params4bit.from_prequantized(
            tensors["weight"], packed, requires_grad=False, device=tensors["weight"].device, module=module
        )
        if bias is not None:
            module.bias = nn.Parameter(bias.to(dtype))
        module.support_avx512bf16_for_cpu = False
        return module

    def describe(self, scheme: Scheme, left_out: Sequence[str], dtype: torch.dtype) -> Description:
        config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False,
            "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": only_format(scheme, "double_quant"), "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": list(left_out),
        }  # fmt: skip
        return Description(config, {})

    def read(self, config: Mapping[str, Any], linears: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
        if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
            raise DataError(
                "quantization_config: bitsandbytes without load_in_4bit; qlm reads NF4 (LLM.int8() folders can be quantized "
                "anew from the float checkpoint with backend int8)"
            )
        for key, wanted in {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"}.items():
            found = config.get(key, "fp4" if key.endswith("quant_type") else "uint8")
            if found != wanted:
                raise DataError(f"quantization_config: {key} is {found!r}; qlm reads {wanted!r}")
        skipped = names_in(config, "llm_int8_skip_modules")
        double_quant = config.get("bnb_4bit_use_double_quant", False)
        if not isinstance(double_quant, bool):
            raise DataError(
                f"quantization_config: bnb_4bit_use_double_quant is {double_quant!r}; expected true or false"
            )
        how = Nf4Format(double_quant, dtype_name(dtype))
        return {
            name: how
            for name in linears
            if not is_head(name)
            and not any(name == skip or name.startswith(skip + ".") or name.endswith("." + skip) for skip in skipped)
        }
