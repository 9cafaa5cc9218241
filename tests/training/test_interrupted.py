"""Signals, damage, a full disk, and another recipe in the place of a run that was stopped."""

import errno
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlm.checkpoint import files
from qlm.errors import CannotCreate, UsageError
from qlm.finetune import CHECKPOINTS, finetune
from qlm.training import state as training_state
from qlm.training.signals import Signals
from tests.conftest import command, files_of, names_below
from tests.training.runs import checkpoint_hashes, recipe_of, stop_at


@pytest.mark.parametrize("backend", ["nf4", "int8"])
def test_quantized_bases_go_on_too(backend: str, folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    model = folder_of("neox-parallel-rotary-0.25")
    for name, step in (("whole", None), ("broken", 3)):
        recipe = recipe_of(model, tmp_path / name, data, quantize={"backend": backend}, adapter={"dropout": 0.3})
        if step is not None:
            with pytest.raises(KeyboardInterrupt):
                finetune(recipe, progress=stop_at(step))
        finetune(recipe)
    whole, broken = files_of(tmp_path / "whole"), files_of(tmp_path / "broken")
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert whole[name] == broken[name], name
    assert (tmp_path / "whole-base" / "config.json").is_file()


def test_sigterm_goes_to_whoever_handles_it_after_the_save(
    folder_of: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    class Terminated(BaseException):
        pass

    def handler(number: int, frame: object) -> None:
        raise Terminated

    recipe = recipe_of(folder_of("opt"), tmp_path / "out", data)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Terminated):
            finetune(recipe, progress=stop_at(2, signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert max(checkpoint_hashes(tmp_path / "out")) == 2
    assert finetune(recipe).resumed == 2


def test_sigterm_on_the_command_line(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """Exit code, one line, a checkpoint of the step in hand, and the same command goes on from it."""
    recipe = recipe_of(folder_of("opt"), tmp_path / "out", data, steps=100_000, save_every=5)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.model_dump_json(exclude_unset=True))
    process = command("finetune", file)
    folder = tmp_path / "out.partial" / CHECKPOINTS
    while not training_state.steps(folder):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    saved = training_state.steps(folder)
    said = [f"recipe: step {max(saved)} is saved", "qlm: terminated; the same command continues"]
    assert errors.splitlines()[-2:] == said
    assert saved
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, progress=stop_at(saved[0] + 2))
    assert training_state.steps(folder)[0] == saved[0] + 2


def test_a_second_signal_is_not_kept() -> None:
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_while_measuring(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """Before the first step it ends the run at once; later the run is saved, and measures when it goes on."""
    settings = dict(validation=0.2, evaluate_every=2)
    model, seen = folder_of("opt"), []

    def progress(number: int) -> Callable[[str, int, int], None]:
        def tell(what: str, done: int, total: int) -> None:
            if (what, done) == ("evaluate", 1):
                seen.append(what)
                if len(seen) == number:
                    signal.raise_signal(signal.SIGINT)

        return tell

    finetune(recipe_of(model, tmp_path / "whole", data, **settings))
    for number in (1, 2, 3):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe_of(model, tmp_path / f"broken{number}", data, **settings), progress=progress(number))
        steps = checkpoint_hashes(tmp_path / f"broken{number}")
        assert max(steps, default=0) == 2 * (number - 1)
        result = finetune(recipe_of(model, tmp_path / f"broken{number}", data, **settings))
        assert result.resumed == 2 * (number - 1)
        assert files_of(tmp_path / f"broken{number}") == files_of(tmp_path / "whole")


def test_a_finished_one_is_left_alone(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder_of("opt"), tmp_path / "out", data)
    finetune(recipe)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert finetune(recipe).resumed == 4
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    other = recipe_of(folder_of("opt"), tmp_path / "out", data, seed=1)
    with pytest.raises(CannotCreate, match="--force"):
        finetune(other)
    assert finetune(other, force=True).resumed == 0


@pytest.mark.parametrize("step", [2, 4])
def test_the_newest_checkpoint_is_damaged(
    step: int, folder_of: Callable[[str], Path], data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune(recipe_of(folder_of("opt"), whole, data, steps=5))
    for number in (1, step):
        with pytest.raises(KeyboardInterrupt):
            finetune(recipe_of(folder_of("opt"), broken, data, steps=5), progress=stop_at(number))
    path = tmp_path / "broken.partial" / CHECKPOINTS / f"step-{step:08d}" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert finetune(recipe_of(folder_of("opt"), broken, data, steps=5)).resumed == 1
    assert [record.getMessage().endswith("going on from step 1") for record in caplog.records] == [True]
    assert files_of(whole) == files_of(broken)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"learning_rate": 2e-2}, "recipe.train.learning_rate: it has 0.01, now it is 0.02"),
        ({"adapter": {"dropout": 0.5}}, "recipe.adapter.dropout: it has 0.05, now it is 0.5"),
        ({"steps": 5}, "recipe.train.steps: it has 4, now it is 5"),
        ({"gradient_accumulation": 3}, "recipe.train.gradient_accumulation: it has 1, now it is 3"),
        ("data", "an unfinished run, and train.data: data.txt has changed since (SHA-256 "),
        ("base", "an unfinished run, and model.safetensors has changed since (SHA-256 "),
    ],
)
def test_something_else_is_refused(
    change: Any, field: str, copy_of: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    model = copy_of("opt")
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe_of(model, tmp_path / "out", data), progress=stop_at(1))
    if change == "data":
        data.write_text(data.read_text("utf-8").replace("e", "a"), "utf-8")
    elif change == "base":
        path = model / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        finetune(recipe_of(model, tmp_path / "out", data, **(change if isinstance(change, dict) else {})))
    assert field in str(error.value)


def test_what_changes_no_byte_may_change(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe_of(folder_of("opt"), tmp_path / "out", data), progress=stop_at(1))
    assert finetune(recipe_of(folder_of("opt"), tmp_path / "out", data, save_every=1)).resumed == 1


def test_a_full_disk_at_a_save(
    folder_of: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune(recipe_of(folder_of("opt"), whole, data))

    def operation(kind: str, path: Path) -> None:
        if kind == "write" and "step-00000003" in str(path) and path.name == "state.json":
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files, "_operation", operation)
    recipe = recipe_of(folder_of("opt"), broken, data, save_every=1)
    with pytest.raises(CannotCreate, match="No space left on device"):
        finetune(recipe)
    monkeypatch.undo()
    assert sorted(checkpoint_hashes(broken)) == [1, 2]
    assert not [name for name in names_below(tmp_path / "broken.partial") if name.endswith(".tmp")]
    assert finetune(recipe).resumed == 2
    assert files_of(whole) == files_of(broken)
