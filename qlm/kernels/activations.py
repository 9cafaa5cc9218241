"""How the CPU kernels round activations, in words for reports and in in features. Imports nothing."""

from typing import Final

FLOAT: Final = "float"
# Each token has its scale and zero point: the int8 format itself.
PER_TOKEN: Final = "int8 per token"
# In features that share a scale: always so many with NF4, and at most so many with GPTQ.
NF4_GROUP: Final = 64
MOST_IN_GPTQ_GROUP: Final = 128


def in_groups(group: int) -> str:
    """One scale for `group` in features of a token, no zero point."""
    return f"int8 in groups of {group}"


def gptq_group(group_size: int, bits: int) -> int:
    """In features whose activations share a scale, as linear_gptq.cpp has it: the most that divide the weight's group, fill
    whole 32-bit words and are 128 or fewer.

    Args:
        group_size: in features of a weight group, whole words.
    """
    period = 32 if bits == 3 else 32 // bits
    most = min(MOST_IN_GPTQ_GROUP, group_size) // period * period
    return next(n for n in range(most, 0, -period) if group_size % n == 0)


def together(kinds: set[str]) -> str:
    """Several linears' activations in one line."""
    return ", ".join(sorted(kinds)) or FLOAT
