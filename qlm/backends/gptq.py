"""GPTQ: 2, 3, 4 or 8 bits in groups, each column's rounding error repaired by the columns after it.

Stored as AutoGPTQ's v1 format (`qweight`, `qzeros`, `scales`, `g_idx`; numerics/packing.py has the bytes), which GPTQModel, vLLM and
transformers with gptqmodel read. v1 and v2 are read, with any g_idx. Settings of single linears are GPTQModel's `dynamic` rules;
transformers ignores those silently, so a folder that has them says so in its manifest and report.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import filterfalse
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
    as_autocast,
    refuse_not_finite,
    refuse_singular,
    refused,
    relative_error,
)
from qlm.backends.target import bias_shift_of, target_of
from qlm.errors import UsageError
from qlm.formats import gptq as gptq_format
from qlm.formats.dtypes import dtype_name
from qlm.formats.gptq import GptqFormat, group_size_of
from qlm.formats.layout import is_head
from qlm.kernels import cuda_ops
from qlm.kernels.ops import dequantize_gptq, gptq_activations, gptq_linear
from qlm.numerics.columns import TORCH, Columns
from qlm.numerics.gptq import (
    GptqResult,
    SingularHessian,
    gptq,
    keep_nearest_where_better,
    row_losses,
    unit_factor,
)
from qlm.numerics.packing import decode_zero_points, encode_zero_points, pack_rows, unpack_rows
from qlm.numerics.refine import refine
from qlm.numerics.rounding import Rounded
from qlm.recipe import LinearSettings

# OPT's linears that vLLM and SGLang fuse, and what they call the whole. Most of their releases look for that name alone in `dynamic`
# (vLLM, `get_dynamic_override`); to GPTQModel and qlm it is a rule that matches nothing.
FUSED, PARTS = "self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def with_fused(formats: Mapping[str, GptqFormat | None]) -> dict[str, GptqFormat | None]:
    """The formats by path, None for floats, with one more after each q, k, v that are all alike: the fused linear's."""
    found: dict[str, GptqFormat | None] = {}
    for name, how in formats.items():
        found[name] = how
        block = name.removesuffix(PARTS[0])
        parts = [f"{block}{part}" for part in PARTS]
        if block != name and all(part in formats and formats[part] == how for part in parts):
            found[f"{block}{FUSED}"] = how
    return found


def _of_codes_before(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a linear, and of its parts, whose codes have been learned since."""
    return {
        "relative_error_before_learning" if name == "relative_error" else name: _of_codes_before(value)
        if isinstance(value, Mapping)
        else value
        for name, value in facts.items()
    }


class GptqLinear(nn.Module):
    """y = x W^T + b with packed weights.

    Buffers, as in the file: qweight int32 [I bits / 32, O]; qzeros int32 [G, O bits / 32]; scales fp16 [G, O]; g_idx int32 [I].
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(
        self, tensors: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int], format: GptqFormat
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bits, self.v2 = format.bits, format.v2
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            self.register_buffer(name, tensors[name])
        self.bias = None if bias is None else nn.Parameter(bias)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        return apply_keeping_dtypes(self, fn)

    def forward(self, x: Tensor) -> Tensor:
        x = as_autocast(x)
        return gptq_linear(x, self.qweight, self.qzeros, self.scales, self.g_idx, self.bias, bits=self.bits, v2=self.v2)

    def activation_format(self) -> str:
        """What a forward pass does with activations, here and now (`gptq_activations`)."""
        return gptq_activations(self.qweight, self.qzeros, self.scales, self.g_idx, bits=self.bits, v2=self.v2)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, bits={self.bits}"


class GptqBackend:
    name = "gptq"
    as_multiplied = None

    def check(self, name: str, shape: tuple[int, int], settings: LinearSettings) -> None:
        O, I = shape
        if I % group_size_of(settings, I):
            raise UsageError(
                f"quantize.group_size: {settings.group_size} does not divide the {I} inputs of {name}; "
                "choose one that does, -1 for one group a row, or leave the layer out with quantize.skip"
            )
        # Both sides of the matrix are packed into 32-bit words; 3-bit values straddle three of them.
        unit = 32 if settings.bits == 3 else 32 // settings.bits
        for side, size in (("inputs", I), ("outputs", O)):
            if size % unit:
                raise UsageError(
                    f"quantize.bits: {name} has {size} {side}, and {settings.bits}-bit packing needs a multiple of {unit}; "
                    "choose other bits or leave the layer out with quantize.skip"
                )

    def quantize(
        self, weights: Mapping[str, Tensor], statistics: Statistics | None, settings: LinearSettings
    ) -> list[QuantizedLinear]:
        assert statistics is not None
        names = ", ".join(weights)
        for name, weight in weights.items():
            refuse_not_finite(f"{name}.weight", weight)
        stacked = torch.cat([weight.float() for weight in weights.values()])
        try:
            result, size, facts = self._solve(stacked, statistics, settings, names)
        except ValueError as error:
            raise refused(weights, error) from None
        rows = [len(weight) for weight in weights.values()]
        shift = bias_shift_of(stacked, result.dequantize(), statistics, settings)
        parts = zip(
            result.codes.split(rows), result.scale.split(rows), result.zero_point.split(rows), result.loss.split(rows),
            size.split(rows), [None] * len(rows) if shift is None else shift.split(rows), strict=True,
        )  # fmt: skip
        return [
            QuantizedLinear(
                {
                    "qweight": pack_rows(codes.T, settings.bits),
                    "qzeros": encode_zero_points(zero_point.T, settings.bits),
                    "scales": scale.T.to(torch.float16).contiguous(),
                    "g_idx": result.g_idx.clone(),
                },
                {**facts, "relative_error": relative_error(loss, size)},
                bias_shift,
                loss,
                size,
            )
            for codes, scale, zero_point, loss, size, bias_shift in parts
        ]

    def _solve(
        self, weight: Tensor, statistics: Statistics, settings: LinearSettings, names: str
    ) -> tuple[GptqResult, Tensor, dict[str, Any]]:
        """Target, GPTQ, refinement; or rounding to nearest where the Hessian cannot be used and the recipe allows it. The second is the
        size of each row, float64 [O]."""
        group_size = group_size_of(settings, weight.shape[1])
        grid: dict[str, Any] = {
            "bits": settings.bits, "symmetric": settings.symmetric, "search": settings.scale_search == "weighted"
        }  # fmt: skip
        found = cuda_ops.columns(weight.device)
        columns = TORCH if found is None else Columns(*found)
        facts = {"bits": settings.bits, "group_size": settings.group_size, "tokens": statistics.tokens}
        try:
            factor = statistics.factor(settings.order, group_size, settings.damp)
        except SingularHessian as error:
            refuse_singular(names, error, settings)
            factor = unit_factor(weight.shape[1], weight.device)
            result = gptq(weight, factor, group_size=group_size, columns=columns, **grid)
            size = row_losses(weight, factor)
            return result, size, {"method": "round_to_nearest", "why": str(error), **facts, "damp": 0.0}
        target, strength = target_of(weight, statistics, settings, factor)
        static = settings.order == "static"
        result = gptq(target, factor, group_size=group_size, static=static, columns=columns, **grid)
        result = keep_nearest_where_better(target, factor, result, **grid)
        nearest_rows, size, damp = result.nearest_rows, row_losses(target, factor), factor.damp
        del factor  # as large as the Hessian, of which there will be another copy; unless it is kept for other settings
        if settings.sweeps:
            result = refine(
                target, statistics.hessian, damp, result.codes, result.scale, result.zero_point, result.g_idx,
                settings.bits, settings.sweeps, columns=columns,
            )  # fmt: skip
        return result, size, {
            "method": "gptq", **facts, "damp": damp, "target_shift": strength, "nearest_rows": nearest_rows
        }  # fmt: skip

    def rounded(self, tensors: Mapping[str, Tensor], settings: LinearSettings) -> Rounded:
        """What a linear's tensors hold, unpacked."""
        return Rounded(
            unpack_rows(tensors["qweight"], settings.bits).T,
            tensors["scales"].float().T,
            decode_zero_points(tensors["qzeros"], settings.bits).T,
            tensors["g_idx"],
            settings.bits,
        )

    def with_codes(self, linear: QuantizedLinear, codes: Tensor, settings: LinearSettings) -> QuantizedLinear:
        """The linear with other codes, uint8 [O, I]; the share of those that have changed is on record.

        What was known of its error is of the codes before, under the Hessian that they were chosen with, and is called so from here on.
        """
        before = unpack_rows(linear.tensors["qweight"], settings.bits).T
        return replace(
            linear,
            tensors={**linear.tensors, "qweight": pack_rows(codes.T, settings.bits)},
            facts={**_of_codes_before(linear.facts), "codes_learned": (codes != before).float().mean().item()},
            loss=None,
            size=None,
        )

    def format(self, settings: LinearSettings, dtype: torch.dtype) -> GptqFormat:
        return GptqFormat(
            settings.bits, settings.group_size, settings.symmetric, settings.order == "act", damp=settings.damp
        )

    def layout(self, shape: tuple[int, int], format: GptqFormat) -> dict[str, TensorLayout]:
        return gptq_format.layout(shape, format)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], format: GptqFormat) -> Tensor:
        return dequantize_gptq(
            tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["g_idx"], format.bits, format.v2
        )

    def module(
        self,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        shape: tuple[int, int],
        format: GptqFormat,
        dtype: torch.dtype,
    ) -> nn.Module:
        g_idx, groups = tensors["g_idx"], tensors["scales"].shape[0]
        gptq_format.check_groups(int(g_idx.min()), int(g_idx.max()), groups)
        return GptqLinear(tensors, None if bias is None else bias.to(dtype), shape, format)

    def describe(self, scheme: Scheme, left_out: Sequence[str], dtype: torch.dtype) -> Description:
        common = Counter(scheme.values()).most_common(1)[0][0]
        dynamic: dict[str, dict[str, Any]] = {}
        everything: dict[str, GptqFormat | None] = {**scheme, **dict.fromkeys(filterfalse(is_head, left_out))}
        for name, how in with_fused(everything).items():
            if how is None:
                dynamic[f"-:^{re.escape(name)}$"] = {}
            elif how != common:
                dynamic[f"+:^{re.escape(name)}$"] = {
                    "bits": how.bits, "group_size": how.group_size, "sym": how.symmetric, "desc_act": how.desc_act
                }  # fmt: skip
        config: dict[str, Any] = {
            "quant_method": "gptq", "method": "gptq", "format": "gptq", "checkpoint_format": "gptq", "bits": common.bits,
            "group_size": common.group_size, "desc_act": common.desc_act, "sym": common.symmetric, "lm_head": False,
            "pack_dtype": "int32", "damp_percent": common.damp, "true_sequential": True, "static_groups": False,
            **({"dynamic": dynamic} if dynamic else {}), "meta": {"quantizer": ["qlm"]},
        }  # fmt: skip
        return Description(config, {"quantize_config.json": config})

    def read(self, config: Mapping[str, Any], linears: Sequence[str], dtype: torch.dtype) -> dict[str, GptqFormat]:
        return gptq_format.read(config, linears, dtype_name(dtype))
