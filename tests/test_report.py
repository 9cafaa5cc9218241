"""Tables, progress and notes: what is in them, and that no name breaks them."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from qlm import report
from qlm.evaluate import Evaluation
from qlm.quantize import QuantizeResult
from qlm.report import Reporter, Row, facts_table, megabytes, output_console, results_table


def evaluation(**changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "perplexity": 11.0, "perplexity_stderr": 0.1, "tokens": 93, "kl_divergence": 0.012341, "kl_stderr": 0.001,
        "same_top1": 0.9512, "same_top1_stderr": 0.01, "baseline_perplexity": 10.0, "baseline_perplexity_stderr": 0.1,
        "length": 32, "windows": 3, "protocol": "p", "bos": "none", "data_sha256": "0" * 64, "activations": "float",
        "seconds": 1.0,
    }  # fmt: skip
    return Evaluation(**{**values, **changes})


def row(model: str = "tiny", **changes: Any) -> Row:
    result: Any = SimpleNamespace(
        output=Path("out/tiny"), bits_per_weight=4.5, bytes=2_000_000, bytes_before=8_000_000, resumed=0, layers={"a": {}},
        choice=None,
    )  # fmt: skip
    values: dict[str, Any] = {
        "recipe": "r.yaml", "model": model, "backend": "nf4", "result": result, "evaluation": evaluation(),
        "quantize_seconds": 1.23, "evaluate_seconds": 4.56, "peak_memory": 3_210_000_000,
    }  # fmt: skip
    return Row(**{**values, **changes})


def shown(table: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    output_console().print(table)
    return capsys.readouterr().out.splitlines()


def test_the_fake_result_has_fields_that_exist() -> None:
    assert vars(row().result).keys() <= QuantizeResult.__dataclass_fields__.keys() | {"bits_per_weight", "bytes"}


def test_row_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    _, line = shown(results_table([row()]), capsys)
    assert " ".join(line.split()) == (
        "tiny nf4 4.500 2.00 MB 0.250 10.000 11.000 +10.00 % 0.01234 95.12 % 1.2 + 4.6 3.21 GB"
    )


def test_row_without_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    _, line = shown(results_table([row(evaluation=None, evaluate_seconds=0.0)]), capsys)
    assert " ".join(line.split()) == "tiny nf4 4.500 2.00 MB 0.250 - - - - - 1.2 3.21 GB"
    assert row(evaluation=None).to_json()["evaluation"] is None


def test_one_line_a_row_however_long_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(results_table([row("a-model-with-a-rather-long-name-of-50-characters-in-it"), row()]), capsys)
    assert len(lines) == 3
    assert "3.21 GB" in lines[1]


@pytest.mark.parametrize("name", ["m[bold]x[/bold]", "[/]", "a:smile:b", "[link=http://x]y"])
def test_names_are_no_markup(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert name in shown(results_table([row(name)]), capfd)[1]
    assert f"model  {name}" in "\n".join(shown(facts_table({"model": name}), capfd))
    reporter = Reporter()
    reporter.note(f"note {name}")
    reporter.console = Console(file=io.StringIO(), force_terminal=True, width=200, markup=False, emoji=False)
    with reporter.progress(f"title {name}") as tell:
        tell("blocks", 1, 2)
    assert capfd.readouterr().err == f"note {name}\n"
    assert f"title {name}: blocks" in reporter.console.file.getvalue()  # type: ignore[attr-defined]


def test_facts(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {
        "layers": 12, "bits_per_weight": 4.123456789, "bytes": 1_500_000, "tied": True, "nothing": None, "kernels": {"a_b": "x"},
        "bytes_by_part": {"norms": 2_000_000}, "my_disk.yaml": {"linears": 12, "disk": 3_000_000_000}, "paths": ["a.b", "c.d"],
        "kl_divergence": 0.000123456, "same_top1": 0.9512, "perplexity": 12.5, "perplexity_stderr": None, "length": 32,
        "diskette": 5, "seconds": 1.5, "evaluation": {"perplexity_stderr": 0.5},
    }  # fmt: skip
    lines = [" ".join(line.split()) for line in shown(facts_table(facts), capsys)]
    assert lines == [
        "layers 12", "bits per weight 4.12346", "bytes 1.50 MB", "tied True", "kernels", "a_b x",
        "bytes by part", "norms 2.00 MB", "my_disk.yaml", "linears 12", "disk 3.00 GB", "paths a.b", "c.d",
        "kl divergence 0.000123456 nats", "same top1 95.12 %", "perplexity 12.5", "length 32 tokens", "diskette 5",
        "seconds 1.5", "evaluation", "perplexity stderr 0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.00 MB"), (999, "0.00 MB"), (1e6, "1.00 MB"), (1e9, "1.00 GB"), (6.5e12, "6500.00 GB")]
)
def test_megabytes(count: float, text: str) -> None:
    assert megabytes(count) == text


class TestProgress:
    def test_quiet(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(report, "PLAIN_SECONDS", 0.0)
        reporter = Reporter(quiet=True)
        reporter.note("a note")
        with reporter.progress("title") as tell:
            tell("blocks", 1, 2)
        assert capfd.readouterr() == ("", "")

    def test_plain_lines(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """No terminal: a line now and then with what is left, never cut at a terminal's width."""
        now = [0.0]
        monkeypatch.setattr("qlm.report.time.monotonic", lambda: now[0])
        title = "[1/2] a-recipe-with-a-long-name" * 4
        with Reporter().progress(title) as tell:
            tell.tokens_per_unit["windows"] = 100
            for done in range(9):
                tell("windows", done, 8)
                now[0] += 4.0
            tell("one step", 1, 1)
        lines = capfd.readouterr().err.splitlines()
        assert lines == [
            f"{title}: windows 3/8, 25 tokens/s, about 20 s left",
            f"{title}: windows 6/8, 25 tokens/s, about 8 s left",
        ]

    def test_bars_on_a_terminal(self) -> None:
        reporter = Reporter()
        reporter.console = Console(file=io.StringIO(), force_terminal=True, width=120)
        with reporter.progress("title") as tell:
            tell("blocks", 0, 4)
            tell("blocks", 4, 4)
        drawn = reporter.console.file.getvalue()  # type: ignore[attr-defined]
        assert "title: blocks" in drawn
        assert "4/4" in drawn

    def test_ends_with_an_error(self) -> None:
        """The bars go away, and the error passes."""
        reporter = Reporter()
        reporter.console = Console(file=io.StringIO(), force_terminal=True, width=120)

        def work() -> None:
            with reporter.progress("title") as tell:
                tell("blocks", 1, 4)
                raise ValueError("inside")

        with pytest.raises(ValueError, match="inside"):
            work()
