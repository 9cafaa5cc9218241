"""Helpers of the backend tests: settings as a recipe gives them, modules from tensors, tiny float folders, quantized folders."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlm.backends import BACKENDS
from qlm.formats.dtypes import dtype_name
from qlm.kernels import cpu_ops
from qlm.kernels.ops import float_activations
from qlm.recipe import LinearSettings, parse_recipe, quantize_section, settings_for
from tests import tiny_models

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FOLDERS = (*tiny_models.FAMILIES, "opt-350m")


# What the CPU kernels' int8 activations change in the output of a linear with 4-bit or GPTQ weights, relative Frobenius norm, when x
# is normal: steps of max|x| / 127, where max|x| of 32 to 128 values is about 3 standard deviations, 3 / 127 / sqrt(12) = 0.7 %;
# with NF4 also levels rounded to int8, 0.0018 of absmax on average, 0.45 %.
INT8_ACTIVATIONS = 0.01


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN and the sign of zero included; for dtypes too that torch.equal does not know."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def settings_of(backend: str, **changes: Any) -> LinearSettings:
    settings = settings_for(quantize_section({"backend": backend, **changes}), "decoder.layers.0.fc1")
    assert settings is not None
    return settings


def check_layout(backend: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], how: Any) -> None:
    """Names, shapes and dtypes are those that the layout promises to readers."""
    layout = BACKENDS[backend].layout(shape, how)
    assert set(tensors) == set(layout)
    for name, tensor in tensors.items():
        wanted = layout[name].shape
        assert len(tensor.shape) == len(wanted), name
        assert all(w in (-1, s) for s, w in zip(tensor.shape, wanted, strict=True)), name
        assert dtype_name(tensor.dtype) in layout[name].dtypes, name
        assert tensor.is_contiguous(), name


@torch.no_grad()
def check_output(module: nn.Module, x: Tensor, expected: Tensor, tolerance: float) -> None:
    """The module's output is the expected one: within `tolerance` of its largest value with float activations, and as near as the
    CPU kernels' int8 activations allow with them."""
    with float_activations():
        assert ((module(x).double() - expected).abs().max() / expected.abs().max()) < tolerance
    error = ((module(x).double() - expected).norm() / expected.norm()).item()
    if cpu_ops.native() is None:
        assert module.activation_format() == "float"
        assert error < tolerance
    else:
        assert module.activation_format().startswith("int8 in groups of ")
        assert tolerance < error < INT8_ACTIVATIONS


def check_gradients(module: nn.Module, weight: Tensor, inputs: int, exact: bool = True) -> None:
    """The gradient of x is the output's times the weight; the bias and an adapter beside the linear learn."""
    x = random(3, 5, inputs, seed=9).requires_grad_()
    assert module.bias is not None
    module.bias.requires_grad_(True)
    down, up = nn.Linear(inputs, 4, bias=False), nn.Linear(4, weight.shape[0], bias=False)
    out = module(x) + up(down(x))
    gradient = random(*out.shape, seed=10)
    out.backward(gradient)
    expected = gradient @ (weight + up.weight @ down.weight).detach()
    if exact:
        assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.allclose(module.bias.grad, gradient.sum((0, 1)), rtol=1e-4, atol=1e-4)
    for adapter in (down, up):
        assert adapter.weight.grad is not None
        assert adapter.weight.grad.abs().sum() > 0
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias"]


def add_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with the families' special tokens: enough to calibrate."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    symbols = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a variant's name to a folder with its fp16 model and a tokenizer; each is made once."""
    root = tmp_path_factory.mktemp("float")

    def make(variant: str) -> Path:
        folder = root / variant
        if not folder.exists():
            tiny_models.build(variant, dtype=torch.float16).save_pretrained(folder)
            add_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def quantized(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """From a variant and the inside of a recipe's `quantize` section to the folder that qlm makes of it; each is made once."""
    from qlm.quantize import quantize

    root = tmp_path_factory.mktemp("quantized")
    made: dict[tuple[str, str], Path] = {}
    text = root / "text.txt"
    text.write_text("".join(f"Line {i}: the quick brown fox number {i * i} jumps.\n" for i in range(400)), "utf-8")

    def make(variant: str, section: str) -> Path:
        if (variant, section) not in made:
            calibration = f"calibration: {{data: {text}, samples: 16, length: 64}}\n" if "gptq" in section else ""
            recipe = parse_recipe(
                f"model: {folders(variant)}\nquantize: {{{section}}}\n{calibration}output: {root / str(len(made))}\n",
                "test",
            )
            made[variant, section] = quantize(recipe).output
        return made[variant, section]

    return make
