"""Which rows of a fused projection make queries, keys and values."""

from typing import Any

from qlm.arch.spec import FamilySpec


def fused_parts(spec: FamilySpec, config: Any, linear: str, outputs: int) -> dict[str, tuple[range, ...]]:
    """The rows of each part of a linear: "q", "k" and "v" of the family's fused projection, nothing for any other linear.

    As transformers' GPTNeoXAttention and GPTBigCodeAttention take them apart.

    Args:
        config: of the model; only its number of heads and `multi_query` are looked at.
        linear: path inside the block.
        outputs: O.
    """
    if linear != spec.fused_linear:
        return {}
    heads = int(getattr(config, spec.heads))
    if spec.fused_qkv == "multi_query" and config.multi_query:
        width = outputs // (heads + 2)
        ends = (0, heads * width, (heads + 1) * width, outputs)
        return {part: (range(ends[i], ends[i + 1]),) for i, part in enumerate("qkv")}
    width = outputs // heads // 3
    return {
        part: tuple(range((3 * head + i) * width, (3 * head + i + 1) * width) for head in range(heads))
        for i, part in enumerate("qkv")
    }
