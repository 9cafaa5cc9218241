"""Which keys of `quantize` mean something to which backend, and what a quality sets: data alone, for the models and for the words."""

from dataclasses import dataclass
from typing import Any, Literal

Backend = Literal["int8", "nf4", "gptq", "quanto"]
Quality = Literal["fast", "balanced", "best"]
Reader = Literal["gptqmodel", "vllm", "transformers"]

# Bits that each backend can write; the first is the default.
BITS: dict[str, tuple[int, ...]] = {"int8": (8,), "nf4": (4,), "gptq": (4, 2, 3, 8)}
QTYPE_BITS: dict[str, int] = {"qint8": 8, "qint4": 4, "qfloat8": 8}
# The keys of `quantize` that mean something to each backend; any other is refused rather than ignored.
TAKES: dict[str, tuple[str, ...]] = {
    "int8": (
        "quality", "bits", "damp", "smooth", "target_shift", "compensate", "sweeps", "bias_correction",
        "tune_steps", "ignore_first", "input_16bit", "skip", "on_failure",
    ),
    "nf4": (
        "quality", "bits", "double_quant", "damp", "scale_search", "target_shift", "compensate", "sweeps",
        "bias_correction", "tune_steps", "ignore_first", "skip", "on_failure",
    ),
    "gptq": (
        "quality", "bits", "group_size", "average_bits", "target_size", "symmetric", "damp", "order", "scale_search", "target_shift", "sweeps",
        "bias_correction", "rounding_steps", "tune_steps", "ignore_first", "skip", "on_failure", "overrides", "reader",
    ),
    "quanto": ("qtype", "skip"),
}  # fmt: skip
# What a quality means: the defaults of these keys, for each backend that takes them.
PRESETS: dict[Quality, dict[str, Any]] = {
    "fast": {
        "target_shift": 0.0, "compensate": False, "sweeps": 0, "bias_correction": False, "smooth": False, "rounding_steps": 0,
        "tune_steps": 0,
    },
    "balanced": {
        "target_shift": "auto", "compensate": True, "sweeps": 2, "bias_correction": True, "smooth": True, "rounding_steps": 0,
        "tune_steps": 0,
    },
    "best": {
        "target_shift": "auto", "compensate": True, "sweeps": 4, "bias_correction": True, "smooth": True, "rounding_steps": 200,
        "tune_steps": 100,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Reads:
    """What software can load of that which gptq writes.

    Attributes:
        bits: of any linear. asymmetric: zero points other than the middle. by_layer: what differs from linear to linear (`dynamic`).
        fused: OPT's q, k and v are one linear, and have to be alike.
        largest_damp: below which `damp_percent`, a mere note in the file, has to be.
    """

    bits: tuple[int, ...]
    asymmetric: bool = True
    by_layer: bool = True
    fused: bool = False
    largest_damp: float | None = None


READERS: dict[Reader, Reads] = {
    # GPTQModel 7.7.0.
    "gptqmodel": Reads((2, 3, 4, 8)),
    # Releases since https://github.com/vllm-project/vllm/pull/38288 (2026) have Marlin's kernels alone: `AutoGPTQConfig.TYPE_MAP`.
    "vllm": Reads((4, 8), asymmetric=False, fused=True),
    # transformers 5.23 with optimum 2.3: `GPTQConfig` and `GPTQQuantizer` drop `dynamic` without a word.
    "transformers": Reads((2, 3, 4, 8), by_layer=False, largest_damp=1.0),
}
