"""Folders for the CPU decoder's tests, and their exact logits: `engine/reference.py` in float64 on dequantized weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

from qlm.checkpoint.adapter import Delta
from qlm.engine import reference
from qlm.load import open_source
from qlm.quantize import quantize
from qlm.recipe import parse_recipe
from tests import tiny_models
from tests.conftest import recipe_text


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Callable[..., Path]:
    """The folder of a variant in a dtype, written on first use. Not to be changed."""
    root = tmp_path_factory.mktemp("float")

    def folder(variant: str, dtype: torch.dtype = torch.float32) -> Path:
        path = root / f"{variant}-{dtype}"
        if not path.exists():
            tiny_models.build(variant, dtype=dtype).save_pretrained(path)
            (path / "tokenizer.json").write_text(tokenizer_json, "utf-8")
        return path

    return folder


@pytest.fixture(scope="session")
def quantized_folder(
    float_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """What `qlm quantize` makes of a variant, from a backend and its settings; made on first use. Not to be changed."""
    root = tmp_path_factory.mktemp("quantized")

    def folder(variant: str, backend: str, **settings: object) -> Path:
        path = root / f"{variant}-{backend}{''.join(f'-{key}={value}' for key, value in settings.items())}"
        if not path.exists():
            source = float_folder(variant, torch.float16)
            quantize(parse_recipe(recipe_text(source, path, backend, text_file, **settings), "test"))
        return path

    return folder


def exact_logits(folder: Path, ids: torch.Tensor, deltas: Mapping[str, Delta] = MappingProxyType({})) -> np.ndarray:
    """float64 [B, T, V] of ids [B, T]. deltas: path of a linear to what an adapter adds to its weight."""
    source, empty = open_source(folder)
    tensors = {}
    for name, stored in source.file_names.items():
        quantized = any(name.startswith(f"{path}.") for path in source.scheme) and not name.endswith(".bias")
        if not quantized and stored in source.checkpoint.tensors:
            tensors[stored] = source.read(name)
    for path, how in source.scheme.items():
        assert source.backend is not None
        shape = tuple(empty.get_submodule(path).weight.shape)
        parts = {suffix: source.read(f"{path}.{suffix}") for suffix in source.backend.layout(shape, how)}
        tensors[f"{path}.weight"] = source.backend.dequantize(parts, shape, how)
    for path, delta in deltas.items():
        added = torch.from_numpy(delta.b).double() @ torch.from_numpy(delta.a).double()
        tensors[f"{path}.weight"] = tensors[f"{path}.weight"].double() + delta.scaling * added
    config = source.config.to_dict()
    return reference.logits(source.spec.model_type, config, tensors, ids, dtype=torch.float64).numpy()
