"""Rounding inside a kernel."""

import triton
import triton.language as tl


@triton.jit
def nearest_level(value, low, high):  # type: ignore[no-untyped-def]
    """The nearest whole number from low to high, both whole and below 2**22; halves to even. (Triton's interpreter has no rint.)"""
    # 1.5 * 2**23 has no fractional bits left. What is added to it must be small: so clamped first.
    return (tl.minimum(tl.maximum(value, low), high) + 12582912.0) - 12582912.0
