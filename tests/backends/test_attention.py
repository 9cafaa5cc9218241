"""Every backend with the attention implementations that run on a CPU, in every dtype, padded on either side: the logits of each row, alone
and unpadded, with eager attention in float32. (flash-attn, and GPUs: evals/gpu_check.py.)"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qlm
from qlm.kernels.ops import float_activations
from qlm.recipe import parse_recipe
from tests import tiny_models
from tests.conftest import FAMILIES, recipe_text

# Largest difference, in units of the logits' root mean square. float32: the order of sums. 16 bits: every weight and activation of two
# layers is rounded, by half an ulp of 2^-8 and 2^-11. int8: a difference in the last bit moves some activations by a step of 1/255.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.04}
INT8_TOLERANCE = {torch.float32: 0.1, torch.bfloat16: 0.3, torch.float16: 0.2}
LENGTHS = (24, 17, 1)


@pytest.fixture(scope="module")
def quantized(
    folder_of: Callable[[str], Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def folder(variant: str, backend: str) -> Path:
        if backend == "float":
            return folder_of(variant)
        if (variant, backend) not in made:
            out = tmp_path_factory.mktemp("quantized") / "out"
            made[variant, backend] = qlm.quantize(
                parse_recipe(recipe_text(folder_of(variant), out, backend, text_file), "r.yaml")
            ).output
        return made[variant, backend]

    return folder


def padded(side: str) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [rows, the longest]: rows of different lengths."""
    ids = tiny_models.token_ids(len(LENGTHS), max(LENGTHS))
    places = torch.arange(max(LENGTHS))
    left = torch.tensor([0 if side == "right" else max(LENGTHS) - length for length in LENGTHS])[:, None]
    mask = ((places >= left) & (places < left + torch.tensor(LENGTHS)[:, None])).long()
    return ids, mask


@torch.no_grad()
def alone(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of all tokens that count, row by row, each without its padding."""
    return torch.cat([model(input_ids=row[None, keep.bool()]).logits[0] for row, keep in zip(ids, mask, strict=True)])


@torch.no_grad()
def together(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return logits[mask.bool()].float()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backend", ["float", "int8", "nf4", "gptq"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_padding(
    variant: str, backend: str, attention: str, dtype: torch.dtype, quantized: Callable[[str, str], Path]
) -> None:
    folder = quantized(variant, backend)
    with float_activations():
        reference = qlm.load(folder, dtype=torch.float32, attn_implementation="eager")
        model = qlm.load(folder, dtype=dtype, attn_implementation=attention)
        tolerance = (INT8_TOLERANCE if backend == "int8" else TOLERANCE)[dtype]
        for side in ("left", "right"):
            ids, mask = padded(side)
            expected = alone(reference, ids, mask)
            difference = (together(model, ids, mask) - expected).abs().max() / expected.square().mean().sqrt()
            assert difference <= tolerance, side
            # What is padding counts for nothing.
            other = torch.where(mask.bool(), ids, 5)
            assert torch.equal(together(model, ids, mask), together(model, other, mask)), side
