"""Opening for the CPU engine: the same files under the same names, and the same refusals, as loading with transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlm.arch import FAMILIES as SPECS
from qlm.checkpoint import reader
from qlm.checkpoint.causal_lm import OpenedCheckpoint, open_causal_lm
from qlm.checkpoint.expected import published_name
from qlm.errors import QlmError, UsageError
from qlm.load import open_source
from tests import tiny_models
from tests.backends.conftest import folders, quantized  # noqa: F401 (fixtures)
from tests.conftest import FAMILIES, ROOT, change_json

Folder = Callable[..., Path]


def check_same_as_load(folder: Path) -> OpenedCheckpoint:
    """Everything that both ways of opening say about a folder is the same."""
    opened = open_causal_lm(folder)
    source, _ = open_source(folder)
    spec = source.spec
    assert opened.spec is spec
    assert opened.tied == source.config.tie_word_embeddings
    names = {published_name(spec, name): stored for name, stored in source.file_names.items()}
    head = f"{spec.published_head}.weight"
    if opened.tied:
        names[head] = names[f"{spec.prefix}.{spec.embedding}.weight"]
    assert opened.tensors == names
    assert set(opened.tensors.values()) <= set(opened.checkpoint.tensors)
    assert opened.formats == source.scheme
    assert opened.backend == (None if source.backend is None else source.backend.name)
    for name, value in opened.fields.items():
        assert getattr(source.config, name) == value or (name, getattr(source.config, name)) == ("n_inner", None), name
    for name in opened.tensors:
        data = source.checkpoint.read(opened.tensors[name])
        assert opened.map(name).array.tobytes() == data.reshape(-1).view(torch.uint8).numpy().tobytes(), name
    return opened


def refusals(folder: Path) -> str:
    """The one line that both ways of opening refuse a folder with."""
    found = []
    for opens in (open_causal_lm, open_source):
        with pytest.raises(QlmError) as caught:
            opens(folder)
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1]
    return found[0][1]


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_every_variant(variant: str, folder_of: Folder) -> None:
    opened = check_same_as_load(folder_of(variant))
    assert (opened.backend, opened.formats, opened.dtype) == (None, {}, "F16")
    for path, shape in opened.linears.items():
        (weight,) = opened.map_linear(path).values()
        assert weight.shape == shape


@pytest.mark.parametrize("variant", [*FAMILIES, "opt-350m"])
@pytest.mark.parametrize(
    "section",
    [
        "backend: int8", "backend: nf4, double_quant: false", "backend: nf4, double_quant: true",
        "backend: gptq, bits: 4, group_size: 32", "backend: gptq, bits: 3, group_size: 64, order: act",
        "backend: gptq, bits: 4, group_size: 32, overrides: {'*.1.*': {bits: 8}}",
    ],
)  # fmt: skip
def test_every_backend(variant: str, section: str, quantized: Callable[[str, str], Path]) -> None:  # noqa: F811
    opened = check_same_as_load(quantized(variant, section))
    assert opened.formats
    for path in opened.formats:
        stored = {name for name in opened.tensors if name.startswith(f"{path}.") and not name.endswith(".bias")}
        assert {f"{path}.{suffix}" for suffix in opened.map_linear(path)} == stored


@pytest.mark.parametrize("variant", FAMILIES)
class TestFileLayouts:
    def test_base_only(self, variant: str, tmp_path: Path) -> None:
        model = tiny_models.build(variant, dtype=torch.float16)
        spec = SPECS[model.config.model_type]
        getattr(model, spec.prefix).save_pretrained(tmp_path)
        if spec.head_tied:
            opened = check_same_as_load(tmp_path)
            assert not any(name.startswith(f"{spec.prefix}.") for name in opened.tensors.values())
        else:
            assert "1 tensor missing: embed_out.weight" in refusals(tmp_path)

    def test_sharded(self, variant: str, tmp_path: Path) -> None:
        tiny_models.build(variant, dtype=torch.float16).save_pretrained(tmp_path, max_shard_size="300KB")
        opened = check_same_as_load(tmp_path)
        assert len(opened.checkpoint.mappings()) == len(list(tmp_path.glob("*.safetensors"))) > 1

    def test_bin(self, variant: str, copy_of: Folder) -> None:
        folder = copy_of(variant)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        check_same_as_load(folder)

    def test_buffers_of_older_files(self, variant: str, copy_of: Folder) -> None:
        folder = copy_of(variant)
        tensors = load_file(folder / "model.safetensors")
        buffer = {
            "opt": None, "gpt_neox": "gpt_neox.layers.0.attention.masked_bias", "gpt_bigcode": "transformer.h.1.attn.bias"
        }[json.loads((folder / "config.json").read_text())["model_type"]]  # fmt: skip
        if buffer is not None:
            save_file({**tensors, buffer: torch.ones(1)}, folder / "model.safetensors")
            assert buffer not in check_same_as_load(folder).tensors
        save_file({**tensors, "lm_head.masked_bias": torch.ones(1)}, folder / "model.safetensors")
        assert "not expected by its config: lm_head.masked_bias" in refusals(folder)

    def test_tied_head(self, variant: str, copy_of: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reader, "_PIECE_ELEMENTS", 1000)
        folder = copy_of(variant, tie_word_embeddings=True)
        tensors = load_file(folder / "model.safetensors")
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
        spec = SPECS[model_type]
        tensors.pop(f"{spec.published_head}.weight", None)
        embedding = tensors[f"{spec.prefix}.{spec.embedding}.weight"]
        for head in (embedding.clone(), embedding.float()):
            save_file({**tensors, f"{spec.published_head}.weight": head}, folder / "model.safetensors")
            assert check_same_as_load(folder).tied
        for index in (0, 999, 1000, embedding.numel() - 1):
            other = embedding.clone()
            other.view(-1)[index] += 1
            save_file({**tensors, f"{spec.published_head}.weight": other}, folder / "model.safetensors")
            assert f"{spec.published_head}.weight: differs from " in refusals(folder)
        change_json(folder / "config.json", tie_word_embeddings=False)
        assert not check_same_as_load(folder).tied


@pytest.mark.parametrize("name", ["embed_out", "lm_head"])
def test_neox_head_under_either_name(name: str, copy_of: Folder) -> None:
    folder = copy_of(FAMILIES[1])
    tensors = load_file(folder / "model.safetensors")
    (old,) = tensors.keys() & {"embed_out.weight", "lm_head.weight"}
    head = tensors.pop(old)
    save_file({**tensors, f"{name}.weight": head}, folder / "model.safetensors")
    assert check_same_as_load(folder).tensors["embed_out.weight"] == f"{name}.weight"
    save_file({**tensors, "embed_out.weight": head, "lm_head.weight": head.clone()}, folder / "model.safetensors")
    assert "1 tensor not expected by its config: lm_head.weight" in refusals(folder)


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "1 tensor missing"),
        ("extra", "1 tensor not expected by its config: more.weight"),
        ("shape", "has shape"),
        ("dtype", "is I32, expected BF16 or F16 or F32"),
        ("renamed", "instead"),
        ("quantized", "qlm reads"),
        ("layers", "missing"),
    ],
)
def test_both_refuse_the_same(variant: str, damage: str, words: str, copy_of: Folder) -> None:
    folder = copy_of(variant)
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("fc1.bias", "dense.bias", "c_proj.bias")))
    if damage == "quantized":
        change_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    elif damage == "layers":
        key = "n_layer" if "bigcode" in variant else "num_hidden_layers"
        change_json(folder / "config.json", **{key: 3})
    else:
        changed = tensors.pop(name) if damage in ("missing", "renamed") else tensors[name]
        replacement = {
            "missing": {}, "extra": {"more.weight": changed.clone()}, "shape": {name: changed[:-1].clone()},
            "dtype": {name: changed.int()}, "renamed": {f"{name}s": changed},
        }[damage]  # fmt: skip
        save_file({**tensors, **replacement}, folder / "model.safetensors")
    assert words in refusals(folder)


def test_a_quantized_tensor_of_another_shape_or_dtype(
    quantized: Callable[[str, str], Path], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    made = quantized("opt", "backend: int8")
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (path,) = (p for p in tmp_path.glob("*.safetensors") if "model.decoder.layers.0.fc1.weight" in load_file(p))
    tensors = load_file(path)
    name = "model.decoder.layers.0.fc1.weight"
    save_file({**tensors, name: tensors[name].half()}, path)
    assert f"{name} is F16, expected I8" in refusals(tmp_path)


def test_quanto_is_refused(copy_of: Folder) -> None:
    folder = copy_of()
    (folder / "quanto_qmap.json").write_text("{}")
    with pytest.raises(UsageError, match=r"quantized by quanto, .* --runtime transformers"):
        open_causal_lm(folder)


NOT_IMPORTED = """
import sys
from qlm.checkpoint.causal_lm import open_causal_lm
from qlm.formats import FORMATS, gptq, nf4
import qlm.checkpoint.files, qlm.checkpoint.manifest, qlm.checkpoint.hub, qlm.checkpoint.reader
from qlm.tokenizer import read_tokenizer, stop_ids
for folder in sys.argv[1:]:
    opened = open_causal_lm(folder)
    for path in opened.linears:
        tensors = {suffix: mapped.array for suffix, mapped in opened.map_linear(path).items()}
        if path in opened.formats and opened.backend != "int8":
            FORMATS[opened.backend].unpack(tensors, opened.linears[path], opened.formats[path])
    opened.checkpoint.check_unchanged()
    tokenizer = read_tokenizer(opened.checkpoint)
    assert tokenizer.encode("some text").ids
    assert stop_ids(opened.fields, tokenizer)
heavy = {"torch", "transformers", "pydantic", "bitsandbytes", "accelerate", "datasets", "safetensors"} & sys.modules.keys()
assert not heavy, heavy
print("done", end="")
"""


def test_nothing_heavy_is_imported(
    folder_of: Folder, copy_of: Folder, quantized: Callable[[str, str], Path]  # noqa: F811
) -> None:  # fmt: skip
    binary = copy_of(FAMILIES[2])
    tensors = load_file(binary / "model.safetensors")
    (binary / "model.safetensors").unlink()
    torch.save(
        {name: tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor for name, tensor in tensors.items()},
        binary / "pytorch_model.bin",
    )
    made = [quantized("opt", section) for section in ("backend: int8", "backend: nf4", "backend: gptq, bits: 4")]
    done = subprocess.run(
        [sys.executable, "-c", NOT_IMPORTED, *map(str, [*map(folder_of, FAMILIES), binary, *made])],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "done", "")


def test_the_error_of_a_missing_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusals(tmp_path / "no")
