"""The page holds the run's own numbers, is well-formed, brings nothing from elsewhere, and says nothing that another run would not say."""

import copy
import html.parser
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from qlm.training.report import smoothed, training_report
from tests.training.test_line_chart import SVG, of_class, points_in

RECIPE: dict[str, Any] = {
    "model": "tiny-opt",
    "revision": None,
    "task": "causal-lm",
    "quantize": {"backend": "gptq", "bits": 3},
    "adapter": {"r": 8, "alpha": 16, "dropout": 0.05, "targets": "all_linear", "initialization": "svd"},
    "train": {
        "batch_size": 2, "gradient_accumulation": 4, "learning_rate": 2e-4, "schedule": "cosine", "warmup": 0.03,
        "weight_decay": 0.0, "max_gradient_norm": 1.0, "packing": True, "seed": 7,
    },
}  # fmt: skip
DATA = {"data": "words.jsonl", "rows": 90, "tokens": 1234567, "samples": 100, "cut": 11, "skipped": 12, "empty": 13}
VERSIONS = dict.fromkeys(("qlm", "torch", "transformers", "peft", "accelerate"), "1.2.3") | {
    "device": "cpu",
    "processes": "1",
}


def records(steps: int, every: int = 3) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            out.append(
                {
                    "step": step,
                    "loss": 4.123456789 / step,
                    "learning_rate": 1e-4 * step,
                    "gradient_norm": 0.7 + step / 9,
                }
            )
        if every and step % every == 0:
            out.append({"step": step, "validation_loss": 4.0 - step / 7, "validation_perplexity": 54.6 - step})
    return out


def training(metrics: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    measured = [record for record in metrics if "validation_loss" in record]
    losses = [record["loss"] for record in metrics if "loss" in record]
    data = {**DATA, "left_over": 0}
    return {
        "steps": len(losses), "trainable_parameters": 9876543, "target_tokens": 4321, "max_length": 512, "precision": "float32",
        "optimizer": "adamw", "gradient_checkpointing": False, "data": {"data": data, **({"validation": data} if measured else {})},
        "loss": {"first": losses[0], "last": losses[-1]},
        "validation": {"before": measured[0], "after": measured[-1]} if measured else None, **more,
    }  # fmt: skip


def page_of(metrics: list[dict[str, Any]], recipe: dict[str, Any] = RECIPE, **more: Any) -> str:
    return training_report(recipe, training(metrics, **more), VERSIONS, metrics)


class Page(html.parser.HTMLParser):
    """Elements that are open, text of table rows, and attributes; every end has its beginning."""

    EMPTY = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def charts(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_numbers_are_those_of_the_metrics() -> None:
    metrics = records(31)
    text = page_of(metrics)
    loss, rate, norm = charts(text)
    for root, kind, key in (
        (loss, "each", "loss"), (loss, "measured", "validation_loss"), (rate, "smooth", "learning_rate"),
        (norm, "each", "gradient_norm"),
    ):  # fmt: skip
        wanted = [(record["step"], record[key]) for record in metrics if key in record]
        found = list(points_in(root, kind))
        assert len(found) == len(wanted), key
        for (step, value), (x, y, x_precision, y_precision) in zip(wanted, found, strict=True):
            assert x == pytest.approx(step, abs=2 * x_precision), key
            assert y == pytest.approx(value, abs=2 * y_precision), key
    assert len(list(points_in(loss, "smooth"))) == 31

    rows = Page(text).rows
    table = rows[rows.index(["Step", "Validation loss", "Validation perplexity"]) + 1 :]
    wanted_rows = [
        (r["step"], r["validation_loss"], r["validation_perplexity"]) for r in metrics if "validation_loss" in r
    ]
    assert len(table) == len(wanted_rows)
    for found_row, wanted_row in zip(table, wanted_rows, strict=True):
        # Six digits.
        assert [float(cell) for cell in found_row] == pytest.approx(wanted_row, rel=5e-6)


def test_facts() -> None:
    facts = {row[0]: row[1] for row in Page(page_of(records(31))).rows if len(row) == 2}
    assert facts["Base"] == "tiny-opt, quantized by gptq, 3 bits"
    assert facts["Adapter"] == "r 8, alpha 16, dropout 0.05, initialization svd, targets all_linear"
    assert facts["Trainable parameters"] == "9,876,543"
    assert facts["Data"] == "words.jsonl: 90 rows; 1,234,567 tokens; 100 samples: 11 cut, 12 skipped, 13 empty"
    assert facts["Steps"] == "31, of 4 × 2 rows"
    assert facts["Tokens learned from"] == "4,321"
    assert (facts["Precision"], facts["Optimizer"]) == ("float32", "adamw")
    assert facts["Loss of the first and last step"] == "4.12346 → 0.133015"
    assert facts["Validation perplexity, before and after"] == "54.6 → 24.6"


def test_parts_of_a_file() -> None:
    whole = {"rows": 1197, "left_over": 1}
    part = {"data": "p.txt", "rows": 60, "tokens": 1900}
    rows = [{**part, "file": whole}, {**part, "file": {**whole, "samples": 5, "cut": 4, "skipped": 3, "empty": 2}}]
    page = Page(page_of(records(2), data={"data": rows[0], "validation": rows[1]}))
    found = {row[0]: row[1] for row in page.rows if len(row) == 2}
    start, end = "p.txt: 60 of the file's 1,197 rows; 1,900 tokens; ", "1 tokens left over at the file's end"
    assert found["Data"] == start + end
    assert found["Validation data"] == f"{start}the file's 5 samples: 4 cut, 3 skipped, 2 empty; {end}"


def test_it_brings_everything_with_it() -> None:
    text = page_of(records(31))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "a"} & set(page.tags)
    assert not {name for name, _ in page.attributes if name in ("src", "href", "xlink:href") or name.startswith("on")}
    addresses = re.findall(r"[a-z]+://[^\"]*", text)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in text
    assert "@import" not in text


def test_words_are_escaped() -> None:
    words = "<script>alert('1 & \"2\"')</script>"
    recipe = copy.deepcopy(RECIPE) | {"model": words, "revision": words, "task": "token-classification"}
    recipe["adapter"]["targets"] = [words, "fc*"]
    data = {**DATA, "data": words, "left_over": 5}
    text = page_of(records(4), recipe, labels=[words, "b"], data={"data": data, "validation": data})
    page = Page(text)
    facts = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert "script" not in page.tags
    assert facts["Base"] == f"{words} at revision {words}, quantized by gptq, 3 bits"
    assert facts["Labels"] == f"{words}, b"
    assert facts["Adapter"].endswith(f"targets {words}, fc*")
    assert facts["Data"].startswith(f"{words}: ")
    assert facts["Data"].endswith("5 tokens left over at the end")
    assert "nats per label" in text


def test_one_step_without_validation() -> None:
    text = page_of(records(1, every=0))
    page = Page(text)
    assert ["Validation data", "none"] in page.rows
    assert not [row for row in page.rows if "before and after" in row[0]]
    loss, *_ = charts(text)
    assert not of_class(loss, "measured")
    assert not list(loss.iter(f"{SVG}polyline"))
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_steps_that_were_passed_over() -> None:
    """float16: the loss scale was too high, and there is no norm."""
    metrics = records(6)
    for record in metrics:
        if record["step"] in (1, 2) and "loss" in record:
            record |= {"gradient_norm": None, "skipped": True}
    *_, norm = charts(page_of(metrics))
    assert len(list(points_in(norm, "each"))) == 4
    for record in metrics:
        record["gradient_norm"] = None
    assert len(charts(page_of(metrics))) == 2


def test_smoothed() -> None:
    assert smoothed([]) == []
    assert smoothed([2.5]) == [2.5]
    assert smoothed([3.0] * 500) == pytest.approx([3.0] * 500)
    # Weights 1, 2/3, 4/9 from the newest back.
    assert smoothed([1.0, 4.0, 10.0])[-1] == pytest.approx((10 + 4 * 2 / 3 + 4 / 9) / (1 + 2 / 3 + 4 / 9))
