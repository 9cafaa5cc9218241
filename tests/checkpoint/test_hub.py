"""Hub ids: what is downloaded, and what works without a network. No test here reaches one."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file

from qlm.checkpoint import hub
from qlm.checkpoint.reader import Checkpoint
from qlm.errors import MissingInput

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a hub client that may not use the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill(cache: Path) -> Path:
    """A cached repository as the hub client lays it out."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / "c0").write_text(json.dumps({"model_type": "opt"}))
    save_file({"a": torch.arange(4.0)}, repository / "blobs" / "w0")
    (snapshot / "config.json").symlink_to("../../blobs/c0")
    (snapshot / "model.safetensors").symlink_to("../../blobs/w0")
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_repository_is_found_without_a_network(cache, revision):
    snapshot = fill(cache)
    checkpoint = Checkpoint.open("org/name", revision)
    assert checkpoint.folder == snapshot
    assert checkpoint.read("a").tolist() == [0, 1, 2, 3]


def test_the_hub_client_agrees_about_the_layout(cache):
    """The layout that the tests here make is the one in which the client itself finds its files."""
    snapshot = fill(cache)
    found = huggingface_hub.try_to_load_from_cache("org/name", "config.json", cache_dir=cache)
    assert found == str(snapshot / "config.json")


def test_what_is_not_in_the_cache_is_one_line(cache):
    with pytest.raises(MissingInput, match=r"hub repository 'org/name': the hub cannot be reached \(.*HF_HUB_OFFLINE"):
        Checkpoint.open("org/name")
    fill(cache)
    with pytest.raises(MissingInput, match="at revision 'v2'"):
        Checkpoint.open("org/name", "v2")


def test_a_folder_of_that_name_comes_first(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    save_file({"b": torch.zeros(1)}, tmp_path / "org" / "name" / "model.safetensors")
    assert set(Checkpoint.open("org/name").tensors) == {"b"}


SAFE = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BIN = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]
OTHER = ["README.md", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "training_args.bin", "modeling.py"]


@pytest.mark.parametrize(
    ("weights", "wanted"), [(SAFE + BIN, SAFE), (BIN, BIN), (["sub/model.safetensors", *BIN], BIN)]
)
def test_only_what_is_read_is_downloaded(cache, monkeypatch, weights, wanted):
    snapshot, asked = fill(cache), {}

    class Api:
        def model_info(self, repository: str, revision: str | None, timeout: float) -> SimpleNamespace:
            files = ["config.json", "vocab.json", "merges.txt", *OTHER, *weights, "evil[*].safetensors"]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked[repository, revision] = allow_patterns
        return str(snapshot)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.download("org/name", "v1") == snapshot
    assert asked == {("org/name", "v1"): ["config.json", "vocab.json", "merges.txt", *wanted]}


@pytest.mark.parametrize("cached", [True, False])
def test_a_hub_that_does_not_answer(cache, monkeypatch, cached):
    class Api:
        def model_info(self, *arguments: object, **options: object) -> None:
            raise ConnectionError("[Errno -2] Name or service not known\nmore")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    if cached:
        snapshot = fill(cache)
        assert hub.download("org/name", None) == snapshot
    else:
        with pytest.raises(MissingInput, match="Name or service not known more"):
            hub.download("org/name", None)


def test_a_repository_that_is_not_there(cache, monkeypatch):
    class Api:
        def model_info(self, *arguments: object, **options: object) -> None:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(MissingInput, match="no such repository, or no access to it"):
        hub.download("org/name", None)


@pytest.mark.parametrize(
    "model", ["facebook/opt-125m", "EleutherAI/pythia-160m", "bigcode/gpt_bigcode-santacoder", "a/b.c"]
)
def test_hub_ids(model):
    assert hub.is_hub_id(model)


@pytest.mark.parametrize(
    "model", ["opt", "a/b/c", "./a", "../a", "/a/b", "~/a", "a/", "/a", "a/..", "a/b--c", "a b/c", "a/b\n"]
)
def test_paths_are_no_hub_ids(model):
    assert not hub.is_hub_id(model)


def test_opening_a_folder_does_not_import_the_hub_client(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from qlm.checkpoint.reader import Checkpoint; Checkpoint.open(sys.argv[1])\n"
        "print([name for name in ('huggingface_hub', 'transformers', 'safetensors') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
