"""Linear layers with quantized weights: one op for each weight format, declared once in `ops.py` with its torch
reference."""

from qlm.kernels.ops import gptq_linear, int8_linear, nf4_linear

__all__ = ["gptq_linear", "int8_linear", "nf4_linear"]
