"""The manifest is the same in every run, and every change to an output is found by it."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlm.checkpoint import manifest, strict_json
from qlm.checkpoint.files import PartialFolder
from qlm.errors import DataError, MissingInput

CHANGES = 600


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "qlm": "0.1.0",
        "recipe": {"model": "tiny", "quantize": {"backend": "gptq", "bits": 4}},
        "inputs": {"model.safetensors": {"bytes": 3, "sha256": "00"}},
        "versions": {"torch": "2.13.0"},
        "seed": 0,
        "threads": 2,
        "layers": {"layers.0.fc1": {"method": "gptq", "bits": 4, "damp": 0.01, "relative_error": 1e-05}},
        "bos": "first",
        "config": {"hidden_size": 8},
        **changes,
    }


def write(output: Path) -> Path:
    with PartialFolder(output, {}) as folder:
        folder.write_tensors("model.safetensors", {"a": torch.arange(50).half()})
        folder.write_json("config.json", {"model_type": "opt"})
        folder.write_bytes("merges.txt", b"")
        names = ["model.safetensors", "config.json", "merges.txt"]
        folder.write_json(manifest.NAME, manifest.build(**facts(outputs=folder.facts(names))))
        folder.commit([*names, manifest.NAME])
    return output


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("manifest") / "out")


def test_an_output_as_written_passes(output):
    summary = manifest.verify(output)
    assert summary[0].startswith(f"{output}: 3 files, ")
    assert "1 input files and 1 layers" in summary[1]


def test_the_same_run_gives_the_same_bytes(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    again = write(tmp_path / "elsewhere")
    for name in os.listdir(output):
        assert (again / name).read_bytes() == (output / name).read_bytes()
    assert str(output.parent) not in (output / manifest.NAME).read_text()


def test_every_change_of_one_byte_is_found(output, tmp_path):
    """Some bytes of every file, all bytes of the small ones; the manifest itself included."""
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    chance = random.Random(0)
    places = [(path, at) for path in sorted(copy.iterdir()) for at in range(path.stat().st_size)]
    for path, at in chance.sample(places, min(CHANGES, len(places))):
        data = bytearray(path.read_bytes())
        former = data[at]
        data[at] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises((DataError, MissingInput)) as caught:
            manifest.verify(copy)
        assert path.name in str(caught.value)
        data[at] = former
        path.write_bytes(data)
    assert manifest.verify(copy)


def swap(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "x")
    (folder / "config.json").rename(folder / "model.safetensors")
    (folder / "x").rename(folder / "config.json")


def edit(folder: Path, repair: bool, **changes: Any) -> None:
    """Change the manifest, with a checksum that fits when `repair`."""
    content = {**json.loads((folder / manifest.NAME).read_text()), **changes}
    if repair:
        content["checksum"] = manifest.build(**{k: v for k, v in content.items() if k not in ("checksum", "format")})[
            "checksum"
        ]
    (folder / manifest.NAME).write_bytes(strict_json.dumps(content))


CASES = {
    "renamed": (lambda f: (f / "config.json").rename(f / "config2.json"), "config.json: missing"),
    "added": (lambda f: (f / "extra.txt").write_text(""), "extra.txt: not listed"),
    "hidden file added": (lambda f: (f / ".extra").write_text(""), ".extra: not listed"),
    "folder added": (lambda f: (f / "sub").mkdir(), "sub: not listed"),
    "deleted": (lambda f: (f / "merges.txt").unlink(), "merges.txt: missing"),
    "swapped": (swap, "config.json: changed"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 100), "model.safetensors: changed: its bytes is 100"),
    "emptied": (lambda f: os.truncate(f / "config.json", 0), "config.json: changed"),
    "grown": (lambda f: (f / "merges.txt").write_text("x"), "merges.txt: changed"),
    "folder in its place": (lambda f: ((f / "merges.txt").unlink(), (f / "merges.txt").mkdir()), "not a regular file"),
    "link out": (lambda f: ((f / "merges.txt").unlink(), (f / "merges.txt").symlink_to("/dev/null")), "outside"),
    "seed": (lambda f: edit(f, False, seed=1), "does not agree with its checksum"),
    "format": (lambda f: edit(f, False, format=2), "reads format 1"),
    "field": (lambda f: edit(f, False, extra=2), "does not agree"),
    "white space": (lambda f: (f / manifest.NAME).write_text((f / manifest.NAME).read_text() + " "), "does not agree"),
    "not JSON": (lambda f: (f / manifest.NAME).write_text("x"), "not valid JSON"),
    "a path in it": (lambda f: edit(f, True, outputs={"../x": {"bytes": 0, "sha256": ""}}), "plain file names"),
    "outputs of a list": (lambda f: edit(f, True, outputs={"x": {}}), "plain file names"),
}


@pytest.mark.parametrize("case", CASES)
def test_changes_to_the_folder_are_found(output, tmp_path, case):
    shutil.copytree(output, tmp_path / "copy")
    change, words = CASES[case]
    change(tmp_path / "copy")
    with pytest.raises(DataError) as caught:
        manifest.verify(tmp_path / "copy")
    assert words in str(caught.value)


def test_no_manifest(tmp_path):
    with pytest.raises(MissingInput, match="no such folder"):
        manifest.verify(tmp_path / "no")
    with pytest.raises(MissingInput, match=r"has no manifest\.json"):
        manifest.verify(tmp_path)


def test_facts_of_inputs(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, the example "abc"
    assert manifest.input_facts([tmp_path / "a"]) == {"a": {"bytes": 3, "sha256": expected}}
    assert manifest.sha256_file(tmp_path / "a") == expected
    with pytest.raises(ValueError, match="two input files"):
        manifest.input_facts([tmp_path / "a", tmp_path / "a"])
    with pytest.raises(MissingInput, match="cannot be read: No such file"):
        manifest.sha256_file(tmp_path / "b")
