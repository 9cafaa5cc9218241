"""The small labelled tasks: the same bytes every time, labels that follow from the text, samples that training reads; and their driver."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from evals import make_tasks
from qlm.arch import FAMILIES
from qlm.load import load_tokenizer
from qlm.recipe import DataSource, FinetuneRecipe, load_finetune_recipe
from qlm.training.data import read_samples

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "qlora" / "tasks"
TASKS = ("sequence-classification", "token-classification", "question-answering")
LABELS = {
    "sequence-classification": ["english", "python"],
    "token-classification": ["O", "CAPITAL", "NUMBER", "MARKUP"],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    make_tasks.write(folder)
    return folder


def samples(folder: Path, task: str, suffix: str = "") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}{suffix}.jsonl").read_text("utf-8").splitlines()]


def normal(text: str) -> str:
    return " ".join(text.split())


def passage(sample: dict[str, Any]) -> str:
    return normal(sample.get("text") or sample.get("context") or " ".join(sample["tokens"]))


def test_the_command_writes_the_same_bytes(tasks: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "evals" / "make_tasks.py"), str(tmp_path / "new" / "tasks")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env={"PYTHONHASHSEED": "7"}
    )
    again = {path.name: path.read_bytes() for path in (tmp_path / "new" / "tasks").iterdir()}
    assert again == {path.name: path.read_bytes() for path in tasks.iterdir()}
    assert json.loads(done.stdout) == {name: data.count(b"\n") for name, data in again.items()}
    assert set(again) == {f"{task}{suffix}.jsonl" for task in TASKS for suffix in ("", "-held-out")}


@pytest.mark.parametrize("task", TASKS)
def test_enough_samples_and_none_in_both_parts(tasks: Path, task: str) -> None:
    learned, held_out = samples(tasks, task), samples(tasks, task, "-held-out")
    assert 500 <= len(learned) <= 2000
    assert 200 <= len(held_out) <= 400
    assert not {passage(sample) for sample in learned} & {passage(sample) for sample in held_out}
    assert len({passage(sample) for sample in learned}) > 0.98 * len(learned)


@pytest.mark.parametrize(("suffix", "source"), [("", "calibration_data"), ("-held-out", "evals/texts")])
def test_passages_are_from_the_text_that_their_label_names(tasks: Path, suffix: str, source: str) -> None:
    texts = {name: (ROOT / source / f"{name}.txt").read_text("utf-8") for name in ("english", "python")}
    found = samples(tasks, "sequence-classification", suffix)
    counts = {label: sum(sample["label"] == label for sample in found) for label in texts}
    assert counts["english"] == counts["python"] == len(found) / 2
    for sample in found:
        assert sample["text"] in texts[sample["label"]]
    english = normal(texts["english"])
    for task in ("token-classification", "question-answering"):
        assert all(passage(sample) in english for sample in samples(tasks, task, suffix))


def test_words_have_the_labels_of_the_rule(tasks: Path) -> None:
    expressions = {"NUMBER": r"[0-9]", "MARKUP": r"[`*:|=]|\.\.", "CAPITAL": r"[^\W\d_]"}
    seen = set()
    for sample in samples(tasks, "token-classification", "-held-out"):
        assert len(sample["tokens"]) == len(sample["labels"])
        for number, (word, label) in enumerate(zip(sample["tokens"], sample["labels"], strict=True)):
            seen.add(label)
            fits = [name for name, expression in expressions.items() if re.match(expression, word)]
            if label != "O":
                assert label in fits, word
            else:
                assert not {"NUMBER", "MARKUP"} & set(fits), word
            begins = number == 0 or sample["tokens"][number - 1].endswith((".", ":", "!", "?"))
            if fits == ["CAPITAL"]:
                assert (label == "CAPITAL") == (word[0] != word[0].lower() and not begins), (word, label)
    assert seen == set(LABELS["token-classification"])


MARKS = {
    "literal": ("``", "``"), "reference": (":", "`"), "emphasis": ("*", "*"), "cross-reference": ("{", "}"), "parentheses": ("(", ")"),
}  # fmt: skip


def test_answers_are_the_first_of_their_kind(tasks: Path) -> None:
    asked: dict[str, int] = {}
    for sample in samples(tasks, "question-answering"):
        kind = sample["question"].split()[1]
        asked[kind] = asked.get(kind, 0) + 1
        context, answer, start = sample["context"], sample["answer"], sample["answer_start"]
        assert context[start : start + len(answer)] == answer
        before, after = MARKS[kind]
        assert answer.startswith(before)
        assert answer.endswith(after)
        assert len(answer) > len(before + after)
        if kind in ("literal", "cross-reference"):
            # Nothing before it could be another: the opening mark is not there, or has no end, or is too short or too long.
            assert not re.search(re.escape(before) + r"[^`{}]{2,60}" + re.escape(after), context[:start])
        # Something else could have been asked for.
        others = [other for other, (mark, _) in MARKS.items() if other != kind and mark in context]
        assert others
    assert set(asked) == set(MARKS)
    assert max(asked.values()) < 0.4 * sum(asked.values())


@pytest.mark.parametrize("model", ["tiny-gpt-neox", "tiny-opt", "tiny-gpt-bigcode"])
@pytest.mark.parametrize("task", TASKS)
def test_training_reads_them(tasks: Path, task: str, model: str) -> None:
    folder = ROOT / "evals" / "checkpoints" / model
    spec = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    found = read_samples(
        DataSource(data=str(tasks / f"{task}-held-out.jsonl")), load_tokenizer(folder), spec, task, max_length=256, packing=False,
        too_long="truncate", labels=LABELS.get(task),
    )  # fmt: skip
    assert len(found.rows) == len(samples(tasks, task, "-held-out"))
    assert found.facts["skipped"] == 0
    assert found.facts["cut"] < 0.05 * len(found.rows)


def test_there_is_a_recipe_for_each() -> None:
    assert {path.stem for path in RECIPES.iterdir()} == set(TASKS)
    for task in TASKS:
        path = RECIPES / f"{task}.yaml"
        recipe = load_finetune_recipe(path)
        assert recipe.task == task
        assert recipe.train.labels == LABELS.get(task)
        assert recipe.model == "evals/checkpoints/tiny-gpt-neox"
        assert recipe.train.data == f"out/tasks/{task}.jsonl"
        assert recipe.train.validation == f"out/tasks/{task}-held-out.jsonl"
        commands = path.read_text("utf-8").splitlines()[1:3]
        assert commands == ["#   python evals/make_tasks.py out/tasks", f"#   qlm finetune {path.relative_to(ROOT)}"]


# --- the driver -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_heads() -> ModuleType:
    spec = importlib.util.find_spec("evals.task_heads")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fixed:
    """A model that gives the same outputs whatever it reads."""

    def __init__(self, **outputs: torch.Tensor) -> None:
        self.config, self.outputs = SimpleNamespace(pad_token_id=0), outputs

    def __call__(self, **inputs: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(**self.outputs)


def test_accuracy(task_heads: ModuleType) -> None:
    label = [{"input_ids": [1, 2], "labels": 0}, {"input_ids": [3], "labels": 1}]
    assert task_heads.accuracy(Fixed(logits=torch.tensor([[2.0, 1.0], [2.0, 1.0]])), label) == 0.5
    words = [{"input_ids": [1, 2, 3], "labels": [-100, 1, 0]}, {"input_ids": [3, 4], "labels": [-100, 1]}]
    always_one = torch.tensor([0.0, 1.0]).expand(2, 3, 2)
    assert task_heads.accuracy(Fixed(logits=always_one), words) == pytest.approx(2 / 3)
    assert task_heads.commonest(words) == pytest.approx(2 / 3)
    spans = [
        {"input_ids": [1, 2, 3], "start_positions": 1, "end_positions": 2},
        {"input_ids": [3, 4], "start_positions": 1, "end_positions": 0},
    ]
    starts = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 9.0]])  # the last place is padding
    ends = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert task_heads.accuracy(Fixed(start_logits=starts, end_logits=ends), spans) == 0.5
    assert task_heads.commonest(spans) is None


def test_which_family_has_which_task(task_heads: ModuleType) -> None:
    has = {(model, task) for model in task_heads.MODELS for task in TASKS if task_heads.family_has(model, task)}
    assert len(has) == 7
    assert ("tiny-gpt-bigcode", "token-classification") in has
    assert ("tiny-opt", "token-classification") not in has
    assert ("tiny-gpt-bigcode", "question-answering") not in has


def test_settings_are_those_of_the_shipped_recipe(task_heads: ModuleType, tmp_path: Path) -> None:
    made = task_heads.recipe_for("tiny-opt", "question-answering", tmp_path, None)
    assert isinstance(made, FinetuneRecipe)
    shipped = load_finetune_recipe(RECIPES / "question-answering.yaml")
    other = {"data", "validation", "evaluate_every"}
    assert made.train.model_dump(exclude=other) == shipped.train.model_dump(exclude=other)
    assert Path(made.model).name == "tiny-opt"
    assert made.quantize == shipped.quantize


def test_the_driver_runs(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [
        sys.executable,
        str(ROOT / "evals" / "task_heads.py"),
        "--model",
        "tiny-gpt-bigcode",
        "--task",
        "sequence-classification",
    ]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, "--steps", "8", "--rows", "40", "--out", str(out)], capture_output=True, text=True, timeout=600, env=environment
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    (row,) = report["runs"]
    assert row["class"] == "GPTBigCodeForSequenceClassification"
    assert row["rows"] == report["samples"]["sequence-classification-held-out.jsonl"] == 40
    # Merging rounds; the adapter beside the base and the merged model agree in nearly all samples.
    assert abs(row["merged"] - row["validation_after"]["validation_accuracy"]) <= 0.1
    assert row["validation_after"]["validation_loss"] < row["validation_before"]["validation_loss"]
    assert row["merged"] > row["commonest"]
    assert not list(tmp_path.rglob("*.jsonl"))
    again = subprocess.run(
        [*command, "--steps", "8", "--rows", "40", "--out", str(out)], capture_output=True, text=True, timeout=600, env=environment
    )  # fmt: skip
    assert "there already" in again.stdout
    assert json.loads(again.stdout.splitlines()[-1])["runs"] == [row]
