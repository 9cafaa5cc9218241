"""Heads of tasks, trained in full beside the adapter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlm.adapters import apply_adapter
from qlm.checkpoint.adapter import read_adapter
from qlm.finetune import finetune
from qlm.load import load
from tests.training.runs import SAME_SUMS, STEADY, jsonl, recipe_of


def test_a_new_head_for_three_labels(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    words = ["good", "bad", "odd"]
    rows = [{"text": f"this is {words[i % 3]}" + " so" * (i % 5), "label": words[i % 3]} for i in range(24)]
    data = jsonl(tmp_path / "labels.jsonl", rows)
    recipe = recipe_of(
        folder_of("opt"), tmp_path / "out", data, task="sequence-classification", labels=words, steps=40, batch_size=8,
        max_length=32, validation=str(data),
    )  # fmt: skip
    result = finetune(recipe)
    measured = result.training["validation"]
    assert measured["after"]["validation_loss"] < measured["before"]["validation_loss"]
    assert measured["after"]["validation_accuracy"] == 1.0
    assert result.training["labels"] == words
    heads = read_adapter(tmp_path / "out").heads()
    assert {name: tuple(tensor.shape) for name, tensor in heads.items()} == {"score.weight": (3, 128)}
    # Onto the base from Python: a new head takes the adapter's size and labels.
    base = load(folder_of("opt"), task="sequence-classification", new_head=True)
    model = apply_adapter(base, tmp_path / "out").get_base_model()
    assert model.config.id2label == dict(enumerate(words))
    assert model.config.num_labels == 3
    assert torch.equal(model.score.modules_to_save["default"].weight, torch.from_numpy(heads["score.weight"]))


def test_heads_weigh_labels(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    """Words with labels in rows of different lengths: four batches of 1 are one of 4."""
    variant = "neox-parallel-rotary-0.25"
    rows = [{"tokens": ["word"] * n, "labels": [j % 2 for j in range(n)]} for n in (1, 9, 2, 7)]
    data, model, records = jsonl(tmp_path / "w.jsonl", rows), copy_of(variant, **STEADY[variant]), []
    for batch in (1, 4):
        recipe = recipe_of(
            model, tmp_path / f"out{batch}", data, task="token-classification", batch_size=batch,
            gradient_accumulation=4 // batch, max_length=64, adapter={"dropout": 0.0}, steps=1,
        )  # fmt: skip
        records += finetune(recipe).metrics
    assert [record["tokens"] for record in records] == [19, 19]
    for key in ("loss", "gradient_norm"):
        assert records[0][key] == pytest.approx(records[1][key], rel=10 * SAME_SUMS)


def test_questions(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [
        {"question": "who?", "context": f"it was {n} there", "answer": n, "answer_start": 7} for n in ("Ann", "Bob")
    ]
    recipe = recipe_of(
        folder_of("opt"), tmp_path / "out", jsonl(tmp_path / "q.jsonl", rows), task="question-answering", max_length=32,
        steps=30, validation=str(tmp_path / "q.jsonl"),
    )  # fmt: skip
    measured = finetune(recipe).training["validation"]
    assert measured["after"]["validation_accuracy"] == 1.0
    assert measured["before"]["validation_tokens"] == 4
