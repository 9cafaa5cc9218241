"""`report.html` of a training run: its curves and its facts on one page, without scripts and without anything from elsewhere.

What is in it depends on what the run computed alone. There is no time, host or path in it, so that a run that was interrupted writes the
same page as one that was not.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from qlm.training.line_chart import STYLE, Line, line_chart

# The smoothed line averages over about this share of the run, and over so many steps at least.
SMOOTHED_SHARE, SMOOTHED_STEPS = 0.04, 3

_PAGE = """
:root { color-scheme: light dark; }
body { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; margin: 2rem auto; max-width: 880px; padding: 0 1rem;
  background: #ffffff; color: #1f2328; }
svg { display: block; max-width: 100%; height: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #d1d9e0; font-weight: normal; padding: 0.3rem 1.2rem 0.3rem 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { color: #59636e; white-space: nowrap; }
.numbers td, .numbers th { text-align: right; }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #f0f6fc; }
  th, td { border-color: #30363d; }
  th { color: #9198a1; }
}
"""


def training_report(
    recipe: Mapping[str, Any],
    training: Mapping[str, Any],
    versions: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
) -> str:
    """The page.

    Args:
        recipe, training, versions: as in the output's manifest. metrics: the records of metrics.jsonl.
    """
    steps = [record for record in metrics if "loss" in record]
    measured = [record for record in metrics if "validation_loss" in record]
    losses = [(record["step"], record["loss"]) for record in steps]
    target = "token" if recipe["task"] == "causal-lm" else "label"
    norms = [(record["step"], record["gradient_norm"]) for record in steps if record["gradient_norm"] is not None]
    charts = [
        line_chart(
            [
                *_each_and_smooth(losses),
                Line("validation", "measured", [(record["step"], record["validation_loss"]) for record in measured]),
            ],
            title="Loss",
            unit=f"nats per {target}",
            height=380,
        ),
        line_chart(
            [Line("learning rate", "smooth", [(record["step"], record["learning_rate"]) for record in steps])],
            title="Learning rate", unit="", height=190, from_zero=True,
        ),
    ]  # fmt: skip
    if norms:
        limit = recipe["train"]["max_gradient_norm"]
        charts.append(
            line_chart(
                _each_and_smooth(norms),
                title=f"Norm of the gradient, before it is scaled down to {limit:g}", unit="", height=190, from_zero=True,
            )
        )  # fmt: skip
    title = f"Adapter for {recipe['model']}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escaped(title)}</title>",
            f"<style>{STYLE}{_PAGE}</style>",
            "</head>",
            "<body>",
            f"<h1>{_escaped(title)}</h1>",
            *charts,
            "<h2>Facts</h2>",
            _table(_facts(recipe, training, versions, target)),
            *_measurements(measured),
            "</body>",
            "</html>",
            "",
        ]
    )


def _each_and_smooth(points: Sequence[tuple[int, float]]) -> list[Line]:
    means = smoothed([value for _, value in points])
    return [
        Line("each step", "each", points),
        Line("smoothed", "smooth", [(step, mean) for (step, _), mean in zip(points, means, strict=True)]),
    ]


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean in which a value counts the less the longer ago it was, by a factor each step, and the weights sum up to 1 from the
    first value on."""
    keep = 1 - 1 / max(SMOOTHED_SHARE * len(values), SMOOTHED_STEPS)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight)
    return means


def _facts(
    recipe: Mapping[str, Any], training: Mapping[str, Any], versions: Mapping[str, str], target: str
) -> list[tuple[str, str]]:
    adapter, train = recipe["adapter"], recipe["train"]
    targets = adapter["targets"] if isinstance(adapter["targets"], str) else ", ".join(adapter["targets"])
    processes = "" if versions["processes"] == "1" else f", in {versions['processes']} processes"
    rows = [
        ("Base", _base(recipe)),
        ("Task", recipe["task"]),
        *([("Labels", ", ".join(training["labels"]))] if "labels" in training else []),
        (
            "Adapter",
            f"r {adapter['r']}, alpha {adapter['alpha']}, dropout {adapter['dropout']:g}, initialization {adapter['initialization']}, "
            f"targets {targets}",
        ),
        ("Trainable parameters", f"{training['trainable_parameters']:,}"),
        ("Data", _data(training["data"]["data"])),
        ("Validation data", _data(training["data"]["validation"]) if "validation" in training["data"] else "none"),
        ("Rows", f"at most {training['max_length']:,} tokens each" + (", packed" if train["packing"] else "")),
        (
            "Steps",
            f"{training['steps']:,}, of {train['gradient_accumulation']} × {train['batch_size']} rows{processes}",
        ),
        (f"{target.capitalize()}s learned from", f"{training['target_tokens']:,}"),
        (
            "Learning rate",
            f"{train['learning_rate']:g}, {train['schedule']}, warm-up over {100 * train['warmup']:g} % of the steps",
        ),
        ("Weight decay", f"{train['weight_decay']:g}"),
        ("Precision", training["precision"]),
        ("Optimizer", training["optimizer"]),
        ("Gradient checkpointing", "on" if training["gradient_checkpointing"] else "off"),
        ("Seed", str(train["seed"])),
    ]
    if training["loss"] is not None:
        rows.append(
            ("Loss of the first and last step", " → ".join(_shown(training["loss"][k]) for k in ("first", "last")))
        )
    if training["validation"] is not None:
        before, after = training["validation"]["before"], training["validation"]["after"]
        for key, name in _MEASURES.items():
            if key in before:
                rows.append((f"{name}, before and after", f"{_shown(before[key])} → {_shown(after[key])}"))
    packages = ("qlm", "torch", "transformers", "peft", "accelerate")
    rows.append(("Made by", ", ".join(f"{name} {versions[name]}" for name in packages) + f", on {versions['device']}"))
    return rows


_MEASURES = {
    "validation_loss": "Validation loss",
    "validation_perplexity": "Validation perplexity",
    "validation_accuracy": "Validation accuracy",
}


def _base(recipe: Mapping[str, Any]) -> str:
    base = recipe["model"] + (f" at revision {recipe['revision']}" if recipe["revision"] is not None else "")
    section = recipe["quantize"]
    if section is None:
        return base
    return f"{base}, quantized by {section['backend']}" + (f", {section['bits']} bits" if "bits" in section else "")


def _data(facts: Mapping[str, Any]) -> str:
    """The file's name, what was read of it, and what became of samples that are no use as they are."""
    whole = facts.get("file", facts)
    share, of_file = (f" of the file's {whole['rows']:,}", "the file's ") if whole is not facts else ("", "")
    out = [f"{facts['rows']:,}{share} rows", f"{facts['tokens']:,} tokens"]
    if "samples" in whole:
        lost = ", ".join(f"{whole[key]:,} {key}" for key in ("cut", "skipped", "empty"))
        out.append(f"{of_file}{whole['samples']:,} samples: {lost}")
    if whole["left_over"]:
        out.append(f"{whole['left_over']:,} tokens left over at {of_file or 'the '}end")
    return f"{facts['data']}: {'; '.join(out)}"


def _measurements(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    if not measured:
        return []
    keys = [key for key in _MEASURES if key in measured[0]]
    head = "".join(f"<th>{name}</th>" for name in ("Step", *(_MEASURES[key] for key in keys)))
    rows = [
        "<tr>" + "".join(f"<td>{_shown(record[key])}</td>" for key in ("step", *keys)) + "</tr>" for record in measured
    ]
    return ["<h2>Validation</h2>", '<table class="numbers">', f"<tr>{head}</tr>", *rows, "</table>"]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f'<tr><th scope="row">{_escaped(name)}</th><td>{_escaped(value)}</td></tr>' for name, value in rows]
    return "\n".join(["<table>", *lines, "</table>"])


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
