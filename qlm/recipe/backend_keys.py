"""Which keys of `quantize` mean something to which backend, and what a quality sets: data alone, for the models and for the words."""

from typing import Any, Literal

Backend = Literal["int8", "nf4", "gptq", "quanto"]
Quality = Literal["fast", "balanced", "best"]

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
        "bias_correction", "rounding_steps", "tune_steps", "ignore_first", "skip", "on_failure", "overrides",
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
