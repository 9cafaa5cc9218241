"""What is written, and what is shown meanwhile."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qlm
from qlm.arch import Task
from qlm.checkpoint import manifest
from qlm.errors import DataError
from qlm.finetune import FinetuneResult, finetune
from qlm.training.loop import TrainingLoop
from tests.conftest import names_below
from tests.training.runs import poison, recipe_of


def test_the_output(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder_of("opt"), tmp_path / "out", data, quantize={"backend": "nf4"}, validation=0.1)
    result: FinetuneResult = finetune(recipe)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json", "metrics.jsonl", "report.html",
    ]  # fmt: skip
    assert not (tmp_path / "out.partial").exists()
    assert ": 4 files" in manifest.verify(tmp_path / "out")[0]
    written = manifest.read(tmp_path / "out")
    base = {path.name for path in (tmp_path / "out-base").iterdir()}
    assert set(written["base"]["files"]) <= base
    assert "model.safetensors" in written["base"]["float_files"]
    linears = 2 * 2 * (4 * (128 + 128) + 2 * (128 + 256))
    assert result.training["trainable_parameters"] == linears
    assert str(tmp_path) not in json.dumps(written)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert str(tmp_path) not in page
    for record in map(json.loads, lines):
        if "validation_loss" in record:
            assert f"<td>{record['validation_loss']:.6g}</td>" in page
    assert set(json.loads(lines[1])) == {"step", "loss", "learning_rate", "gradient_norm", "tokens"}


def test_progress(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """Every step, and beside it what a bar shows."""

    class Tell:
        def __init__(self) -> None:
            self.notes: dict[str, str] = {}
            self.seen: list[tuple[str, int, int]] = []

        def __call__(self, what: str, done: int, total: int) -> None:
            self.seen.append((what, done, total))

    tell = Tell()
    result = finetune(recipe_of(folder_of("opt"), tmp_path / "out", data), progress=tell)
    assert [(done, total) for what, done, total in tell.seen if what == "train"] == [(i, 4) for i in range(5)]
    assert re.fullmatch(r"loss \d\.\d{4}, \d+ tokens/s, peak \d+\.\d\d GB", tell.notes["train"])
    assert tell.notes["train"].startswith(f"loss {result.metrics[-1]['loss']:.4f},")


def test_tensorboard(folder_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = finetune(recipe_of(folder_of("opt"), tmp_path / "out", data, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "out-tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([record["loss"] for record in result.metrics])


def test_an_error_before_the_first_save_leaves_nothing(
    folder_of: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingLoop, "begin_step", lambda self: poison(next(self.model.parameters())))
    with pytest.raises(DataError, match="no checkpoint was written yet"):
        finetune(recipe_of(folder_of("opt"), tmp_path / "out", data))
    assert names_below(tmp_path) == {"data.txt"}


def test_next_commands(tmp_path: Path) -> None:
    """As a shell takes them; a head continues no prompt, and a model on the hub is named with its revision."""

    def words(task: Task, base: str, revision: str | None) -> list[list[str]]:
        result = FinetuneResult(tmp_path / "my adapter", base, revision, task, 1, 0, {}, [])
        return [shlex.split(line) for line in result.next_commands()]

    output = str(tmp_path / "my adapter")
    merge = [output, "--into", "float", "--output", f"{output}-merged"]
    generate = ["--adapter", output, "--prompt", "..."]
    assert words("causal-lm", "a base", None) == [
        ["qlm", "generate", "a base", *generate],
        ["qlm", "merge", "a base", *merge],
    ]
    assert words("token-classification", "a/b", "main") == [["qlm", "merge", "a/b", "--revision", "main", *merge]]


@pytest.mark.parametrize("quality", ["fast", "balanced"])
def test_the_merge_that_is_suggested_runs(
    quality: str, folder_of: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    """Onto the float weights that the base was made from; with smoothed weights, which fit no others, onto the base."""
    adapter, text = {"targets": ["q_proj"]}, {"data": str(data), "samples": 4, "length": 16}
    more: dict[str, Any] = {"calibration": text} if quality == "balanced" else {}
    quantize = {"backend": "int8", "quality": quality}
    wanted = recipe_of(folder_of("opt"), tmp_path / "out", data, adapter, quantize=quantize, steps=1, **more)
    result = finetune(wanted)
    generate, merge = [shlex.split(line) for line in result.next_commands()]
    assert generate[2] == f"{tmp_path}/out-base"
    assert merge[2] == (str(folder_of("opt")) if quality == "fast" else f"{tmp_path}/out-base")
    made = qlm.merge(merge[2], merge[3], merge[5], merge[7])
    assert (made.onto, made.base) == (
        ("float weights", "the adapter was trained on a quantized copy of this base")
        if quality == "fast"
        else ("dequantized int8 weights", "the adapter was trained on this base")
    )
    assert finetune(wanted).next_commands() == result.next_commands()
