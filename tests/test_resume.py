"""Interrupted at any point, the same command continues and ends with the same bytes; anything else is refused by name."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlm
from qlm.checkpoint import files, manifest
from qlm.errors import CannotCreate, UsageError
from qlm.quantize import QuantizeResult
from qlm.recipe import Recipe, parse_recipe
from tests import tiny_models
from tests.conftest import ROOT, change_json, files_of, recipe_text

Folder = Callable[..., Path]
BLOCKS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    path = tmp_path_factory.mktemp("resume") / "model"
    torch.manual_seed(0)
    tiny_models.opt(num_hidden_layers=BLOCKS).half().save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer_json)
    return path


@pytest.fixture(scope="module")
def complete(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, text_file: Path
) -> Callable[[str], dict[str, bytes]]:
    """The files of a run that nothing interrupted."""
    root, made = tmp_path_factory.mktemp("complete"), {}

    def run(backend: str) -> dict[str, bytes]:
        if backend not in made:
            recipe = parse_recipe(recipe_text(folder, root / backend, backend, text_file), "r.yaml")
            made[backend] = files_of(qlm.quantize(recipe).output)
        return made[backend]

    return run


@pytest.fixture
def recipe(folder: Path, text_file: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(backend: str = "gptq", model: Path = folder, **more: Any) -> Recipe:
        return parse_recipe(recipe_text(model, tmp_path / "out", backend, text_file, **more), "r.yaml")

    return make


def run_until(recipe: Recipe, block: int, error: BaseException) -> None:
    """Stop at the start of a block's turn."""

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("quantize", block):
            raise error

    with pytest.raises(type(error)):
        qlm.quantize(recipe, progress=stop)


@pytest.mark.parametrize("backend", ["gptq", "nf4"])
@pytest.mark.parametrize("block", range(BLOCKS + 1))
def test_ctrl_c_at_every_block(
    backend: str, block: int, recipe: Callable[..., Recipe], complete: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    run_until(recipe(backend), block, KeyboardInterrupt())
    # Nothing is left where nothing was finished.
    assert (tmp_path / "out.partial").exists() == (block > 0)
    assert not (tmp_path / "out").exists()
    result = qlm.quantize(recipe(backend))
    assert result.resumed == block
    assert files_of(result.output) == complete(backend)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_again_and_again(
    recipe: Callable[..., Recipe], complete: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    for block in (2, 1, 3, BLOCKS):
        run_until(recipe(), block, KeyboardInterrupt())
    assert files_of(qlm.quantize(recipe()).output) == complete("gptq")


def test_a_damaged_shard_is_made_again(
    recipe: Callable[..., Recipe], complete: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    run_until(recipe(), 4, KeyboardInterrupt())
    shards = sorted((tmp_path / "out.partial" / "files").iterdir())
    data = bytearray(shards[1].read_bytes())
    data[-3] ^= 4
    shards[1].write_bytes(data)
    shards[2].unlink()
    result = qlm.quantize(recipe())
    assert result.resumed == 2
    assert files_of(result.output) == complete("gptq")


def test_skipped_linears(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Replaying a finished block of which a part was left in 16 bits."""
    wanted = recipe(skip=["*.1.self_attn.*", "*.2.*"], overrides={"*.fc2": {"bits": 8}})
    run_until(wanted, 4, KeyboardInterrupt())
    resumed = files_of(qlm.quantize(wanted).output)
    shutil.rmtree(tmp_path / "out")
    assert files_of(qlm.quantize(wanted).output) == resumed


class TestChanged:
    @pytest.fixture
    def half(self, recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
        run_until(recipe(), 3, KeyboardInterrupt())
        return tmp_path / "out.partial"

    def refused(self, changed: Recipe, half: Path, field: str, *, is_file: bool = False) -> None:
        before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
        words = rf" with another {field}: it has .*"
        if is_file:
            words = rf", and {field} has changed since \(SHA-256 \w{{12}}… then, \w{{12}}… now\); "
        with pytest.raises(UsageError, match=rf"out\.partial: an unfinished run{words}.*--force"):
            qlm.quantize(changed)
        assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before

    def test_setting(self, half: Path, recipe: Callable[..., Recipe]) -> None:
        self.refused(recipe(group_size=64), half, r"recipe\.quantize\.group_size")

    def test_backend(self, half: Path, recipe: Callable[..., Recipe]) -> None:
        with pytest.raises(UsageError, match="an unfinished run with another"):
            qlm.quantize(recipe("nf4"))

    def test_text(self, half: Path, folder: Path, text_file: Path, tmp_path: Path) -> None:
        other = tmp_path / "words.txt"
        other.write_text(text_file.read_text("utf-8") + "!", "utf-8")
        changed = parse_recipe(recipe_text(folder, tmp_path / "out", "gptq", other), "r.yaml")
        self.refused(changed, half, r"calibration: words\.txt", is_file=True)

    def test_model(self, half: Path, folder: Path, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
        other = tmp_path / "other" / "model"
        shutil.copytree(folder, other)
        change_json(other / "config.json", activation_function="gelu")
        self.refused(recipe(model=other), half, r"config\.json", is_file=True)

    def test_threads(self, half: Path, recipe: Callable[..., Recipe]) -> None:
        torch.set_num_threads(2)
        try:
            words = "was begun with 1 thread, and this run has 2: give --threads 1, or --force to start over"
            with pytest.raises(UsageError, match=words):
                qlm.quantize(recipe())
        finally:
            torch.set_num_threads(1)

    def test_version(self, half: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
        import importlib.metadata

        real = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "torch" else real(name))
        self.refused(recipe(), half, r"versions\.torch")

    def test_force_starts_over(
        self, half: Path, recipe: Callable[..., Recipe], complete: Callable[..., dict[str, bytes]]
    ) -> None:
        (half / "files" / "model-00002-of-00006.safetensors").write_bytes(b"of another recipe")
        result = qlm.quantize(recipe(), force=True)
        assert result.resumed == 0
        assert files_of(result.output) == complete("gptq")

    def test_moved_model_and_text_are_the_same(
        self, half: Path, folder: Path, text_file: Path, tmp_path: Path, complete: Callable[..., dict[str, bytes]]
    ) -> None:
        model = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
        text = shutil.copy(text_file, tmp_path / "elsewhere" / "words.txt")
        result = qlm.quantize(parse_recipe(recipe_text(model, tmp_path / "out", "gptq", text), "r.yaml"))
        assert result.resumed == 3
        assert files_of(result.output) == complete("gptq")


class TestDisk:
    def test_full(
        self, recipe: Callable[..., Recipe], complete: Callable[..., dict[str, bytes]], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Full in the middle: what is done stays; once there is room again, the same command ends the same."""
        import errno

        def full(kind: str, path: Path) -> None:
            if kind == "write" and path.name.startswith("model-00004"):
                raise OSError(errno.ENOSPC, "no space")

        with monkeypatch.context() as patch:
            patch.setattr(files, "_operation", full)
            with pytest.raises(CannotCreate, match=r"model-00004.*No space left on device: \d+ bytes needed, \d+ free"):
                qlm.quantize(recipe())
        assert not list((tmp_path / "out.partial" / "files").glob("*.tmp"))
        result = qlm.quantize(recipe())
        assert result.resumed == 2
        assert files_of(result.output) == complete("gptq")

    def test_full_from_the_start(
        self, recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import errno

        def full(kind: str, path: Path) -> None:
            if kind == "write" and path.name.startswith("model-"):
                raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(files, "_operation", full)
        with pytest.raises(CannotCreate, match="No space left"):
            qlm.quantize(recipe())
        assert list(tmp_path.iterdir()) == []


def test_two_writers(recipe: Callable[..., Recipe], complete: Callable[..., dict[str, bytes]]) -> None:
    def other(what: str, done: int, total: int) -> None:
        if (what, done) == ("quantize", 2):
            with pytest.raises(CannotCreate, match="another process is writing it"):
                qlm.quantize(recipe())

    assert files_of(qlm.quantize(recipe(), progress=other).output) == complete("gptq")


# --- real processes ---------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
import qlm.quantize, sys
module = sys.modules["qlm.quantize"]
real = module.quantize_block
def slow(*args):
    time.sleep(0.15)
    return real(*args)
module.quantize_block = slow
from qlm.cli import main
main()
"""


@pytest.fixture
def recipe_path(folder: Path, text_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text(folder, tmp_path / "out", "gptq", text_file))
    return path


def slow_run(recipe: Path) -> subprocess.Popen[str]:
    """`qlm quantize` with a pause in each block, so that there is something to interrupt."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, "quantize", recipe, "--threads", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals(
    number: int, code: int, word: str, recipe_path: Path, recipe: Callable[..., Recipe], tmp_path: Path,
    complete: Callable[..., dict[str, bytes]],
) -> None:  # fmt: skip
    process = slow_run(recipe_path)
    wait_for(process, tmp_path / "out.partial" / "files" / "model-00003-of-00006.safetensors")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    # Before it, on a slow machine, a line of progress.
    *progress, last = err.splitlines()
    assert (out, last) == ("", f"qlm: {word}; the same command continues")
    assert all(line.startswith("[1/1] r: ") for line in progress)
    assert not (tmp_path / "out").exists()
    result = qlm.quantize(recipe())
    assert result.resumed >= 1  # the second block's record may not have been written yet
    assert files_of(result.output) == complete("gptq")


@pytest.mark.parametrize("seed", range(3))
def test_kill(
    seed: int, recipe_path: Path, recipe: Callable[..., Recipe], tmp_path: Path,
    complete: Callable[..., dict[str, bytes]],
) -> None:  # fmt: skip
    """SIGKILL after a random shard and a random moment more; evals/kill_test.py does this more often, on real models."""
    chance = random.Random(seed)
    process = slow_run(recipe_path)
    shard = chance.randint(2, BLOCKS)
    wait_for(process, tmp_path / "out.partial" / "files" / f"model-{shard:05d}-of-00006.safetensors")
    time.sleep(chance.random() * 0.3)
    process.kill()
    process.communicate()
    result = qlm.quantize(recipe())
    assert result.resumed >= shard - 1
    assert files_of(result.output) == complete("gptq")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "r.yaml"}


def test_a_finished_output_survives_a_kill_before_tidying(
    recipe: Callable[..., Recipe], complete: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    result: QuantizeResult = qlm.quantize(recipe())
    partial = tmp_path / "out.partial"
    partial.mkdir()
    identity = {key: value for key, value in manifest.read(result.output).items() if key in ("recipe", "inputs")}
    (partial / "identity.json").write_text(json.dumps(identity))
    (partial / "lock").touch()
    assert qlm.quantize(recipe()).resumed == BLOCKS
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert files_of(result.output) == complete("gptq")
