"""Which rows are queries, keys and values, against what transformers' attention hands to its kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from qlm.arch import FAMILIES
from qlm.arch.parts import fused_parts
from qlm.load import block_paths
from qlm.smoothing import source_rows
from tests import tiny_models

FUSED = [variant for variant in tiny_models.VARIANTS if not variant.startswith("opt")]


def seen_by_attention(model: Any, linear: Any) -> dict[str, set[int]]:
    """The numbers of the rows that reach queries, keys and values, from a projection whose every output is its own number."""
    seen: dict[str, set[int]] = {}

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        # One token, at position 0, where rotary embeddings turn nothing.
        seen.update(zip("qkv", ({round(x) for x in t.flatten().tolist()} for t in (query, key, value)), strict=True))
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    AttentionInterface.register("spy", spy)
    model.config._attn_implementation = "spy"
    linear.weight.zero_()
    linear.bias.copy_(torch.arange(linear.out_features))
    model(torch.tensor([[5]]), use_cache=False)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("variant", FUSED)
def test_rows_are_those_that_attention_reads(variant: str) -> None:
    model = tiny_models.build(variant)
    spec, config = FAMILIES[model.config.model_type], model.config
    assert spec.fused_linear is not None
    linear = model.get_submodule(f"{block_paths(spec, model)[-1]}.{spec.fused_linear}")
    parts = fused_parts(spec, config, spec.fused_linear, linear.out_features)
    rows = {part: [row for ranges in found for row in ranges] for part, found in parts.items()}
    assert list(rows) == ["q", "k", "v"]
    assert sorted(row for found in rows.values() for row in found) == list(range(linear.out_features))
    assert {part: set(found) for part, found in rows.items()} == seen_by_attention(model, linear)
    # What smoothing takes for the values.
    (fold,) = [fold for fold in spec.folds if fold.through == "attention"]
    assert set(source_rows(fold, spec, config, config.hidden_size).tolist()) == set(rows["v"])


def test_other_linears_have_none() -> None:
    for variant in tiny_models.FAMILIES:
        model = tiny_models.build(variant)
        spec = FAMILIES[model.config.model_type]
        linears = [linear for stage in spec.stages for group in stage for linear in group.linears]
        found = [linear for linear in linears if fused_parts(spec, model.config, linear, 384)]
        assert found == ([spec.fused_linear] if spec.fused_linear else [])
