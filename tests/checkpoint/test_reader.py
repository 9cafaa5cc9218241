"""Model folders: every layout of real models is read bit for bit, every attack on paths and indexes is refused."""

import ctypes
import gc
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlm.checkpoint import reader
from qlm.checkpoint.reader import Checkpoint, check_tensors
from qlm.errors import DataError, MissingInput, QlmError, UsageError
from qlm.formats.dtypes import NUMPY_DTYPES, dtype_name, torch_dtype

CONFIG = {"model_type": "opt", "hidden_size": 8}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(4, 3, generator=chance),
        "b.half": torch.randn(5, generator=chance).half(),
        "c.bf16": torch.randn(2, 2, generator=chance).bfloat16(),
        "d.packed": torch.randint(-(2**31), 2**31 - 1, (3, 2), generator=chance).int(),
        "e.codes": torch.randint(0, 255, (7, 1), generator=chance).to(torch.uint8),
        "f.flag": torch.tensor([True, False]),
        "g.scalar": torch.tensor(3.5),
        "h.empty": torch.ones(0, 2),
    }


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], kind: str = "safetensors") -> dict[str, str]:
    """Two shards and their index; the weight map."""
    write_config(folder)
    names, weight_map = list(tensors), {}
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{stem}-{number:05}-of-00002.{kind}"
        chosen = {name: tensors[name] for name in part}
        if kind == "safetensors":
            save_file(chosen, folder / shard)
        else:
            torch.save(chosen, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    write_index(folder, weight_map, f"{stem}.{kind}.index.json")
    return weight_map


def write_index(folder: Path, weight_map: dict[str, Any], name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def check_equal(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(tensors)
    for name, expected in tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == expected.dtype == torch_dtype(checkpoint.tensors[name].dtype)
        assert found.shape == expected.shape == checkpoint.tensors[name].shape
        assert found.is_contiguous()
        assert torch.equal(found, expected), name
        check_mapped(checkpoint, name, expected)
    checkpoint.check_unchanged()


def check_mapped(checkpoint: Checkpoint, name: str, expected: torch.Tensor) -> None:
    """The map of a tensor has its bytes, at the address that it says, and cannot be written to."""
    mapped = checkpoint.map(name)
    data = expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert (mapped.dtype, mapped.shape) == (dtype_name(expected.dtype), tuple(expected.shape))
    assert mapped.array.shape == mapped.shape
    assert mapped.array.dtype == NUMPY_DTYPES[mapped.dtype]
    assert mapped.nbytes == len(data) == checkpoint.tensors[name].bytes
    assert mapped.array.tobytes() == ctypes.string_at(mapped.address, mapped.nbytes) == data, name
    with pytest.raises(ValueError, match="read-only"):
        mapped.array[...] = 0
    inside = any(
        0 <= mapped.address - file.ctypes.data <= file.nbytes - mapped.nbytes for file in checkpoint.mappings()
    )
    assert inside == (checkpoint.tensors[name].stride is None)


def refusal(folder: Path, kind: type[QlmError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        Checkpoint.open(folder)
    assert str(caught.value).isprintable()
    return str(caught.value)


LAYOUTS = ["single", "sharded", "autogptq", "autogptq sharded", "bin", "sharded bin"]


def write_layout(folder: Path, tensors: dict[str, torch.Tensor], layout: str) -> list[str]:
    """A model folder; the names that `files` should give."""
    write_config(folder)
    if layout == "single":
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif layout == "autogptq":
        save_file(tensors, folder / "gptq_model-4bit-128g.safetensors")
    elif layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        write_shards(folder, tensors, "bin" if layout == "sharded bin" else "safetensors")
        if layout == "autogptq sharded":
            index = folder / "model.safetensors.index.json"
            index.rename(folder / "gptq_model-4bit-128g.safetensors.index.json")
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_bit_for_bit(tmp_path, tensors, layout):
    names = write_layout(tmp_path / "m", tensors, layout)
    (tmp_path / "m" / "vocab.json").write_text("{}")
    (tmp_path / "m" / "README.md").write_text("about")
    checkpoint = Checkpoint.open(str(tmp_path / "m"))
    check_equal(checkpoint, tensors)
    assert [file.name for file in checkpoint.files()] == sorted([*names, "vocab.json"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_the_hub_cache_is_read(tmp_path, tensors, layout):
    """As the hub client lays it out: files are links into blobs/."""
    names = write_layout(tmp_path / "plain", tensors, layout)
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, name in enumerate(names):
        (tmp_path / "plain" / name).rename(repository / "blobs" / f"{number:064}")
        (snapshot / name).symlink_to(f"../../blobs/{number:064}")
    for folder, revision in (
        (snapshot, None),
        (snapshot, COMMIT),
        (repository, None),
        (repository, "main"),
        (repository, COMMIT),
    ):
        check_equal(Checkpoint.open(folder, revision), tensors)
    with pytest.raises(MissingInput, match="revision 'v2' is not in the cache"):
        Checkpoint.open(repository, "v2")
    for revision in ("../../x", "a/b", "/etc"):
        with pytest.raises(UsageError, match="not the name of a revision"):
            Checkpoint.open(repository, revision)
    (repository / "refs" / "main").write_text("../../../..")
    with pytest.raises(DataError, match="40 hex digits"):
        Checkpoint.open(repository)


def test_links_inside_the_folder_are_followed(tmp_path, tensors):
    write_layout(tmp_path / "m", tensors, "single")
    (tmp_path / "m" / "parts").mkdir()
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "parts" / "w")
    (tmp_path / "m" / "model.safetensors").symlink_to("parts/w")
    (tmp_path / "link").symlink_to("m")
    check_equal(Checkpoint.open(tmp_path / "link"), tensors)


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]
)
@pytest.mark.parametrize("target", ["outside", "nowhere", "loop", "device", "parent"])
def test_links_out_of_the_folder_are_refused(tmp_path, tensors, file, target):
    layout = {"model-00001-of-00002.safetensors": "sharded", "pytorch_model.bin": "bin"}.get(file, "single")
    write_layout(tmp_path / "m", tensors, layout)
    path = tmp_path / "m" / file
    path.rename(tmp_path / "secret")
    if target == "parent":
        (tmp_path / "m" / "up").symlink_to("..")
    path.symlink_to(
        {"outside": "../secret", "nowhere": "gone", "loop": file, "device": "/dev/zero", "parent": "up/secret"}[target]
    )
    assert "a link " in refusal(tmp_path / "m")


def test_a_link_into_the_blobs_of_another_repository_is_refused(tmp_path, tensors):
    write_layout(tmp_path / "other", tensors, "single")
    blobs = tmp_path / "models--org--other" / "blobs"
    snapshot = write_config(tmp_path / "models--org--name" / "snapshots" / COMMIT)
    blobs.mkdir(parents=True)
    (tmp_path / "other" / "model.safetensors").rename(blobs / "0")
    (snapshot / "model.safetensors").symlink_to(blobs / "0")
    assert "outside the model's folder" in refusal(snapshot)


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_what_is_not_a_regular_file_is_refused(tmp_path, tensors, kind, file, monkeypatch):
    write_layout(tmp_path / "m", tensors, "single")
    path = tmp_path / "m" / file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        monkeypatch.chdir(path.parent)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(file)
    assert "not a regular file" in refusal(tmp_path / "m")


@pytest.mark.parametrize(
    "shard",
    [
        "../model-00001-of-00002.safetensors", "..", "/etc/passwd", "/tmp/x.safetensors", "sub/x.safetensors",
        "..\\x.safetensors", "C:\\x.safetensors", "C:x.safetensors", "\\\\host\\x.safetensors", "a\0.safetensors",
        "a\n.safetensors", "a\x1b[2J.safetensors", "", ".", "x.bin", "x", "config.json", "a" * 300 + ".safetensors",
        "file:///x.safetensors", "~/x.safetensors", "\u202ex.safetensors", "*.safetensors", 3, None, ["x.safetensors"],
        {"a": 1},
    ],
    ids=repr,
)  # fmt: skip
def test_shard_names_that_are_not_plain_are_refused(tmp_path, tensors, shard):
    weight_map = write_shards(tmp_path / "m", tensors)
    write_index(tmp_path / "m", {**weight_map, "a.weight": shard})
    assert "is said to lie in" in refusal(tmp_path / "m")


def test_an_index_and_its_shards_must_agree(tmp_path, tensors):
    folder = tmp_path / "m"
    good = write_shards(folder, tensors)
    first, second = sorted(set(good.values()))
    write_index(folder, {**good, "new": first})
    assert "lacks 'new' (1 in all)" in refusal(folder)
    write_index(folder, {name: shard for name, shard in good.items() if name != "a.weight"})
    assert "holds 'a.weight' (1 in all), which does not exist according to" in refusal(folder)
    write_index(folder, {**good, "a.weight": second})
    assert "which lies in 'model-00002-of-00002.safetensors' according to" in refusal(folder)
    write_index(folder, {**good, "a.weight": "model-00003-of-00003.safetensors"})
    assert "lies in 'model-00003" in refusal(folder)
    write_index(folder, {**good, "x": "model-00003-of-00003.safetensors"})
    assert "model-00003-of-00003.safetensors: missing" in refusal(folder, MissingInput)
    for text in (
        '{"weight_map": {}}',
        "[]",
        '{"weight_map": []}',
        "{}",
        '{"weight_map": {"a": "b.safetensors"}, "x": 1}',
    ):
        (folder / "model.safetensors.index.json").write_text(text)
        assert "expected an object" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    assert "appears twice" in refusal(folder)
    write_index(folder, good)
    (folder / second).unlink()
    assert "missing" in refusal(folder, MissingInput)


def test_a_tied_head_may_be_in_the_index_alone(tmp_path):
    tensors = {"model.decoder.embed_tokens.weight": torch.ones(2, 2), "a": torch.ones(1)}
    weight_map = write_shards(tmp_path / "m", tensors)
    write_index(tmp_path / "m", {**weight_map, "lm_head.weight": weight_map["a"]})
    check_equal(Checkpoint.open(tmp_path / "m"), tensors)
    write_config(tmp_path / "m", tie_word_embeddings=False)
    assert "lacks 'lm_head.weight'" in refusal(tmp_path / "m")


def test_candidates_of_equal_rank_are_refused(tmp_path, tensors):
    folder = tmp_path / "m"
    write_shards(folder, tensors)
    save_file(tensors, folder / "model.safetensors")
    assert "which of them describes the weights is not clear" in refusal(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    assert "no index" in refusal(folder)


def test_safetensors_come_before_bin(tmp_path, tensors):
    folder = write_config(tmp_path / "m")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    assert set(Checkpoint.open(folder).tensors) == {"a"}


def test_a_pickle_under_the_name_of_safetensors_is_refused(tmp_path, tensors):
    folder = write_config(tmp_path / "m")
    torch.save(tensors, folder / "model.safetensors")
    assert "is it a safetensors file?" in refusal(folder)


def test_missing_pieces_are_named(tmp_path, tensors):
    assert "does not exist" in refusal(tmp_path / "no", MissingInput)
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(tmp_path / "file", MissingInput)
    (tmp_path / "m").mkdir()
    assert "has no config.json" in refusal(tmp_path / "m", MissingInput)
    write_config(tmp_path / "m")
    assert "has no weights" in refusal(tmp_path / "m", MissingInput)
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    save_file(tensors, tmp_path / "m" / "adapter_model.safetensors")
    assert "it is an adapter" in refusal(tmp_path / "m", MissingInput)
    with pytest.raises(UsageError, match=r"a revision .* is for hub ids alone"):
        Checkpoint.open(tmp_path / "m", "main")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}', " " * (5 << 20)])
def test_a_damaged_config_is_refused(tmp_path, tensors, text):
    write_layout(tmp_path / "m", tensors, "single")
    (tmp_path / "m" / "config.json").write_text(text)
    assert "config.json" in refusal(tmp_path / "m")


@pytest.mark.parametrize(
    "model", ["", "a\0b", "no/such/folder", "./no", "../no", "/no/such", "gpt2", "--x/y", "a/b--c"]
)
def test_names_that_lead_nowhere(model):
    with pytest.raises(MissingInput):
        Checkpoint.open(model)


def test_a_file_that_shrinks_while_it_is_open(tmp_path, tensors):
    write_layout(tmp_path / "m", tensors, "single")
    checkpoint = Checkpoint.open(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 200)
    with pytest.raises(DataError, match="ends at byte"):
        list(map(checkpoint.read, checkpoint.tensors))


@pytest.mark.parametrize("change", [-200, 200])
@pytest.mark.parametrize("layout", ["single", "sharded", "bin"])
def test_a_file_that_changes_its_size_before_or_after_it_is_mapped(tmp_path, tensors, layout, change):
    write_layout(tmp_path / "m", tensors, layout)
    late, early = Checkpoint.open(tmp_path / "m"), Checkpoint.open(tmp_path / "m")
    path = early.tensors["a.weight"].file
    early.map("a.weight")
    early.check_unchanged()
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(DataError, match=rf"{path.name}: has \d+ bytes, and had \d+ when it was opened"):
        early.check_unchanged()
    with pytest.raises(DataError, match=rf"{path.name}: has \d+ bytes, and had \d+ when it was opened"):
        late.map("a.weight")
    late.check_unchanged()  # nothing of it is mapped


def test_a_file_that_leads_out_of_the_folder_is_not_mapped(tmp_path, tensors):
    write_layout(tmp_path / "m", tensors, "single")
    checkpoint = Checkpoint.open(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.rename(tmp_path / "secret")
    path.symlink_to("../secret")
    with pytest.raises(DataError, match="outside the model's folder"):
        checkpoint.map("a.weight")


def test_each_file_is_mapped_once_and_lives_as_long_as_its_arrays(tmp_path, tensors):
    write_layout(tmp_path / "m", tensors, "sharded")
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert checkpoint.mappings() == []
    for _ in range(2):
        mapped = [checkpoint.map(name) for name in tensors]
        assert len(checkpoint.mappings()) == 2
    sizes = sorted(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    files = checkpoint.mappings()
    assert sorted(file.nbytes for file in files) == sizes
    (array,) = (m.array for name, m in zip(tensors, mapped, strict=True) if name == "a.weight")
    del checkpoint, mapped
    gc.collect()
    assert array.tobytes() == tensors["a.weight"].numpy().tobytes()
    assert sum(file[-1] >= 0 for file in files) == 2


def test_a_replaced_file_leaves_the_map_as_it_was(tmp_path, tensors):
    """Files are replaced by a rename, which leaves the old one to those who have it open."""
    write_layout(tmp_path / "m", tensors, "single")
    checkpoint = Checkpoint.open(tmp_path / "m")
    mapped = checkpoint.map("a.weight")
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / "m" / "model.safetensors")
    checkpoint.check_unchanged()
    assert mapped.array.tobytes() == tensors["a.weight"].numpy().tobytes()


@pytest.mark.parametrize("layout", LAYOUTS[-2:])
def test_tensors_of_bin_files_that_are_not_in_row_major_order_are_copied(tmp_path, layout):
    storage = torch.arange(40).float()
    tensors = {
        "transposed": storage[:12].reshape(3, 4).T,
        "stepped": storage[1:20:3],
        "inside": storage[20:32].reshape(3, 4)[:, 1:3],
        "plain": storage[4:12].reshape(2, 4),
    }
    write_layout(tmp_path / "m", tensors, layout)
    checkpoint = Checkpoint.open(tmp_path / "m")
    check_equal(checkpoint, tensors)
    assert checkpoint.map("stepped").address == checkpoint.map("stepped").address


@pytest.mark.parametrize("pieces", [2, 1000])
def test_same_values_compares_numbers_across_dtypes(tmp_path, monkeypatch, pieces):
    values = torch.linspace(-2, 2, 9).reshape(3, 3)
    tensors = {
        "single": values, "half": values.half(), "brain": values.bfloat16(), "transposed": values.T.contiguous().T,
        "other": values + torch.eye(3) * 2**-7, "zero": torch.zeros(1), "minus zero": -torch.zeros(1),
        "nan": torch.tensor([torch.nan]), "same nan": torch.tensor([torch.nan]), "minus nan": -torch.tensor([torch.nan]),
    }  # fmt: skip
    write_layout(tmp_path / "m", tensors, "bin")
    monkeypatch.setattr(reader, "_PIECE_ELEMENTS", pieces)
    checkpoint = Checkpoint.open(tmp_path / "m")
    for name in ("single", "half", "brain", "transposed"):
        assert checkpoint.same_values("single", name)
        assert checkpoint.same_values(name, "half")
        assert not checkpoint.same_values(name, "other")
    assert checkpoint.same_values("zero", "minus zero")
    assert checkpoint.same_values("nan", "same nan")
    assert not checkpoint.same_values("nan", "minus nan")
    assert not checkpoint.same_values("zero", "nan")


def test_a_bool_that_is_neither_is_refused(tmp_path):
    write_layout(tmp_path / "m", {"f": torch.tensor([True])}, "single")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    for give in (Checkpoint.open(tmp_path / "m").read, Checkpoint.open(tmp_path / "m").map):
        with pytest.raises(DataError, match="bytes other than 0 and 1"):
            give("f")


def test_the_quantization_settings_are_found_in_both_places(tmp_path, tensors):
    folder = tmp_path / "m"
    write_layout(folder, tensors, "single")
    assert Checkpoint.open(folder).quantize_config is None
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    assert Checkpoint.open(folder).quantize_config == {"bits": 4}
    write_config(folder, quantization_config={"quant_method": "gptq"})
    assert Checkpoint.open(folder).quantize_config == {"quant_method": "gptq"}
    write_config(folder, quantization_config=[])
    with pytest.raises(DataError, match="quantization_config is a list"):
        _ = Checkpoint.open(folder).quantize_config


def test_other_files_are_reached_by_plain_names_only(tmp_path, tensors):
    write_layout(tmp_path / "m", tensors, "single")
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert checkpoint.path("config.json") == tmp_path / "m" / "config.json"
    assert checkpoint.path("vocab.json") is None
    assert checkpoint.read_json("vocab.json") is None
    for name in ("../m/config.json", "/etc/passwd", "a/b"):
        with pytest.raises(DataError, match="is not allowed"):
            checkpoint.path(name)


FLOAT = frozenset({"F32", "F16"})


def expected_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], frozenset[str]]]:
    return {name: (tuple(tensor.shape), frozenset({dtype_name(tensor.dtype)})) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"new.weight": ((1,), FLOAT)}, "1 tensor missing: new.weight"),
        ({"a.wieght": ((4, 3), FLOAT), "a.weight": None}, "missing: a.wieght; the checkpoint has 'a.weight' instead"),
        ({"a.weight": None}, "1 tensor not expected by its config: a.weight"),
        ({f"x{number}": ((1,), FLOAT) for number in range(5)}, "5 tensors missing: x0, x1, x2 and 2 more"),
        ({"a.weight": ((3, 4), FLOAT)}, "a.weight has shape [4, 3], its config implies [3, 4]"),
        ({"a.weight": ((12,), FLOAT)}, "a.weight has shape [4, 3]"),
        ({"c.bf16": ((2, 2), FLOAT)}, "c.bf16 is BF16, expected F16 or F32"),
    ],
    ids=["equal", "missing", "misspelt", "extra", "many", "shape", "rank", "dtype"],
)
def test_names_shapes_and_dtypes_must_be_those_of_the_config(tmp_path, tensors, changes, words):
    write_layout(tmp_path / "m", tensors, "single")
    checkpoint = Checkpoint.open(tmp_path / "m")
    expected = {name: value for name, value in {**expected_of(tensors), **changes}.items() if value is not None}
    if words is None:
        check_tensors(checkpoint, expected)
        return
    with pytest.raises(DataError) as caught:
        check_tensors(checkpoint, expected)
    assert words in str(caught.value)


def test_ignored_names_may_be_there(tmp_path, tensors):
    write_layout(tmp_path / "m", {**tensors, "gpt_neox.layers.3.attention.bias": torch.ones(1)}, "single")
    checkpoint = Checkpoint.open(tmp_path / "m")
    check_tensors(checkpoint, expected_of(tensors), [r"layers\.\d+\.attention\.bias"], prefix="gpt_neox")
    check_tensors(checkpoint, expected_of(tensors), [r"gpt_neox\.layers\.\d+\.attention\.bias"])
    with pytest.raises(DataError, match="not expected"):
        check_tensors(checkpoint, expected_of(tensors), [r"layers\.\d+\.attention"], prefix="gpt_neox")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_ahead_asks_for_the_bytes_of_each_tensor(tmp_path, tensors, layout, monkeypatch):
    write_layout(tmp_path / "m", tensors, layout)
    checkpoint = Checkpoint.open(tmp_path / "m")
    asked = []

    def advise(descriptor, offset, size, how):
        assert how == os.POSIX_FADV_WILLNEED
        asked.append(os.pread(descriptor, size, offset))
        raise OSError("this file system takes no advice")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    names = ["a.weight", "c.bf16", "d.packed"]
    checkpoint.read_ahead(names)
    assert sorted(asked) == sorted(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in names)
