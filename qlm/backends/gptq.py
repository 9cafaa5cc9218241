"""GPTQ: 2, 3, 4 or 8 bits in groups, each column's rounding error repaired by the columns after it.

Stored as AutoGPTQ's v1 format (`qweight`, `qzeros`, `scales`, `g_idx`; numerics/packing.py has the bytes), which GPTQModel, vLLM and
transformers with gptqmodel read. v1 and v2 are read, with any g_idx. Settings of single linears are GPTQModel's `dynamic` rules;
transformers ignores those silently, so a folder that has them says so in its manifest and report.
"""

import re
from collections import Counter
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
)
from qlm.errors import DataError, UsageError
from qlm.kernels.ops import dequantize_gptq, gptq_linear
from qlm.numerics.gptq import SingularHessian, column_order, factorize, gptq, unit_factor, weighted_norm
from qlm.numerics.packing import encode_zero_points, pack_rows
from qlm.recipe import LinearSettings

BITS = (2, 3, 4, 8)
# Rules come from files, and Python's matcher backtracks: for ever over a repeated group such as (a+)+ or (.|.)*, and by the power of
# their number over other repetitions.
LONGEST_RULE = 500
REPEATED_GROUP = re.compile(r"\)[+*{?]")
MOST_REPEATS = 4


@dataclass(frozen=True)
class GptqFormat:
    """`group_size` -1 is one group a row; `v2`: zero points are stored as they are, not less one."""

    bits: int
    group_size: int
    symmetric: bool = True
    desc_act: bool = False
    v2: bool = False
    damp: float = 0.01


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
        return gptq_linear(x, self.qweight, self.qzeros, self.scales, self.g_idx, self.bias, bits=self.bits, v2=self.v2)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, bits={self.bits}"


def _group_size(settings_or_format: Any, inputs: int) -> int:
    return inputs if settings_or_format.group_size == -1 else settings_or_format.group_size


class GptqBackend:
    name = "gptq"
    needs_calibration = True

    def check(self, name: str, shape: tuple[int, int], settings: LinearSettings) -> None:
        O, I = shape
        if I % _group_size(settings, I):
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
            if not bool(weight.isfinite().all()):
                raise DataError(f"{name}.weight: a weight is NaN or infinite; the checkpoint is damaged")
        stacked = torch.cat([weight.float() for weight in weights.values()])
        group_size = _group_size(settings, stacked.shape[1])
        hessian = statistics.hessian
        order = column_order(hessian.diagonal(), settings.order, group_size)
        method, why = "gptq", {}
        try:
            factor = factorize(hessian, order, settings.damp)
        except SingularHessian as error:
            if settings.on_failure == "error":
                raise DataError(
                    f"{names}: the Hessian of the calibration text cannot be used: {error}; use more or other text, "
                    "or accept rounding to nearest for such layers with quantize.on_failure: round_to_nearest"
                ) from None
            factor, method, why = unit_factor(stacked.shape[1], stacked.device), "round_to_nearest", {"why": str(error)}
        try:
            result = gptq(
                stacked, factor, bits=settings.bits, group_size=group_size, symmetric=settings.symmetric,
                search=settings.scale_search == "weighted",
            )  # fmt: skip
        except ValueError as error:
            raise DataError(f"{names}: {error}") from None
        norm = weighted_norm(stacked, factor)
        facts = {
            "method": method, **why, "bits": settings.bits, "group_size": settings.group_size, "damp": factor.damp,
            "tokens": statistics.tokens, "relative_error": result.error / norm if norm > 0 else 0.0,
        }  # fmt: skip
        rows = [len(weight) for weight in weights.values()]
        parts = zip(result.codes.split(rows), result.scale.split(rows), result.zero_point.split(rows), strict=True)
        return [
            QuantizedLinear(
                {
                    "qweight": pack_rows(codes.T, settings.bits),
                    "qzeros": encode_zero_points(zero_point.T, settings.bits),
                    "scales": scale.T.to(torch.float16).contiguous(),
                    "g_idx": result.g_idx.clone(),
                },
                dict(facts),
            )
            for codes, scale, zero_point in parts
        ]

    def format(self, settings: LinearSettings, dtype: torch.dtype) -> GptqFormat:
        return GptqFormat(
            settings.bits, settings.group_size, settings.symmetric, settings.order == "act", damp=settings.damp
        )

    def layout(self, shape: tuple[int, int], format: GptqFormat) -> dict[str, TensorLayout]:
        O, I = shape
        groups, words = -(-I // _group_size(format, I)), frozenset({torch.int32})
        return {
            "qweight": TensorLayout((I * format.bits // 32, O), words),
            "qzeros": TensorLayout((groups, O * format.bits // 32), words),
            "scales": TensorLayout((groups, O), frozenset({torch.float16, torch.bfloat16, torch.float32})),
            "g_idx": TensorLayout((I,), words),
        }

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
        # g_idx is used as an address: a value out of range would read somebody else's memory in a kernel.
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise DataError(f"g_idx holds {int(g_idx.min())} to {int(g_idx.max())}, but there are {groups} groups")
        return GptqLinear(tensors, None if bias is None else bias.to(dtype), shape, format)

    def describe(self, scheme: Scheme, left_out: Sequence[str], dtype: torch.dtype) -> Description:
        common = Counter(scheme.values()).most_common(1)[0][0]
        dynamic: dict[str, dict[str, Any]] = {}
        for name, how in scheme.items():
            if how != common:
                dynamic[f"+:^{re.escape(name)}$"] = {
                    "bits": how.bits, "group_size": how.group_size, "sym": how.symmetric, "desc_act": how.desc_act
                }  # fmt: skip
        for name in left_out:
            if not is_head(name):
                dynamic[f"-:^{re.escape(name)}$"] = {}
        config: dict[str, Any] = {
            "quant_method": "gptq", "method": "gptq", "format": "gptq", "checkpoint_format": "gptq", "bits": common.bits,
            "group_size": common.group_size, "desc_act": common.desc_act, "sym": common.symmetric, "lm_head": False,
            "pack_dtype": "int32", "damp_percent": common.damp, "true_sequential": True, "static_groups": False,
            **({"dynamic": dynamic} if dynamic else {}), "meta": {"quantizer": ["qlm"]},
        }  # fmt: skip
        return Description(config, {"quantize_config.json": config})

    def read(self, config: Mapping[str, Any], linears: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
        stored = config.get("checkpoint_format") or config.get("format") or "gptq"
        if stored not in ("gptq", "gptq_v2"):
            raise DataError(f"quantization_config: checkpoint_format {stored!r}; qlm reads 'gptq' and 'gptq_v2'")
        if config.get("pack_dtype", "int32") != "int32":
            raise DataError(f"quantization_config: pack_dtype {config['pack_dtype']!r}; qlm reads 'int32'")
        if config.get("lm_head"):
            raise DataError(
                "quantization_config: a quantized lm_head; qlm reads folders whose head is in 16 or 32 bits"
            )

        def read_format(values: Mapping[str, Any]) -> GptqFormat:
            bits: Any = values.get("bits")
            group_size: Any = values.get("group_size")
            whole = type(bits) is int and type(group_size) is int  # no 4.0, no true
            if not whole or bits not in BITS or not (group_size == -1 or group_size >= 8):
                raise DataError(
                    f"quantization_config: bits {bits!r} with group_size {group_size!r}; qlm reads bits {BITS} with a group "
                    "size of -1 or at least 8"
                )
            return GptqFormat(
                bits,
                group_size,
                bool(values.get("sym", True)),
                bool(values.get("desc_act", False)),
                stored == "gptq_v2",
            )

        scheme: dict[str, Any] = {}
        rules = config.get("dynamic") or {}
        if not isinstance(rules, Mapping) or not all(c is None or isinstance(c, Mapping) for c in rules.values()):
            raise DataError(f"quantization_config: dynamic {rules!r}; expected rules with a mapping each")
        suffixes = _suffixes(config.get("modules_in_block_to_quantize"))
        # GPTQ tools quantize inside blocks only: no heads, and none of OPT's projections around the blocks.
        for name in (name for name in linears if any(part.isdigit() for part in name.split("."))):
            how: dict[str, Any] | None = dict(config)
            if suffixes is not None and not any(name.endswith("." + suffix) for suffix in suffixes):
                how = None
            for rule, changes in rules.items():
                pattern = rule.removeprefix("+:").removeprefix("-:")
                repeats = sum(map(pattern.count, "+*{"))
                if len(pattern) > LONGEST_RULE or repeats > MOST_REPEATS or REPEATED_GROUP.search(pattern):
                    raise DataError(
                        f"quantization_config: dynamic rule {rule!r} could take for ever to match; qlm takes rules of at most "
                        f"{LONGEST_RULE} characters and {MOST_REPEATS} repetitions, none of them of a group"
                    )
                try:
                    matches = re.match(pattern, name) is not None
                except re.error as error:
                    raise DataError(
                        f"quantization_config: dynamic rule {rule!r} is no regular expression: {error}"
                    ) from None
                if matches:
                    how = None if rule.startswith("-:") or how is None else {**how, **(changes or {})}
                    break  # GPTQModel takes the first rule that matches
            if how is not None:
                scheme[name] = read_format(how)
        return scheme


def _suffixes(inside: Any) -> set[str] | None:
    """The paths in a block that `modules_in_block_to_quantize` names, in one list or in a list for each stage; None means all."""
    if not inside:
        return None
    if isinstance(inside, list):
        paths = [path for stage in inside for path in (stage if isinstance(stage, list) else [stage])]
        if all(isinstance(path, str) for path in paths):
            return set(paths)
    raise DataError(f"quantization_config: modules_in_block_to_quantize {inside!r}; expected lists of module names")
