"""Results for people: tables on the terminal, progress, and what is in a folder. Rich is used here and in cli.py only."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qlm.formats.layout import in_block

# At run time these import torch, and the commands that use the CPU engine do without.
if TYPE_CHECKING:
    from qlm.evaluate import Evaluation
    from qlm.quantize import QuantizeResult

# A plain line this often where there is no terminal to draw a bar on.
PLAIN_SECONDS = 10.0


@dataclass(frozen=True)
class Row:
    """One recipe's result."""

    recipe: str
    model: str
    backend: str
    result: "QuantizeResult"
    evaluation: "Evaluation | None"
    quantize_seconds: float
    evaluate_seconds: float
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "model": self.model,
            "backend": self.backend,
            "output": str(self.result.output),
            "bits_per_weight": round(self.result.bits_per_weight, 4),
            "bytes": self.result.bytes,
            "bytes_before": self.result.bytes_before,
            "quantize_seconds": round(self.quantize_seconds, 2),
            "evaluate_seconds": round(self.evaluate_seconds, 2),
            "peak_memory_bytes": self.peak_memory,
            "resumed_blocks": self.result.resumed,
            **({"choice": dict(self.result.choice)} if self.result.choice is not None else {}),
            "layers": dict(self.result.layers),
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
        }


def megabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def results_table(rows: Sequence[Row]) -> Table:
    """The table that `qlm quantize` prints: one line a recipe."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in (
        "model", "backend", "bits/weight", "size", "of float", "ppl float", "ppl", "change", "KL (nats)", "same top-1", "seconds",
        "peak RAM",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name in ("model", "backend") else "right", no_wrap=True)
    for row in rows:
        measured = ["-"] * 5
        e = row.evaluation
        if (
            e is not None
            and e.baseline_perplexity is not None
            and e.kl_divergence is not None
            and e.same_top1 is not None
        ):
            measured = [
                f"{e.baseline_perplexity:.3f}",
                f"{e.perplexity:.3f}",
                f"{100 * (e.perplexity / e.baseline_perplexity - 1):+.2f} %",
                f"{e.kl_divergence:.5f}",
                f"{100 * e.same_top1:.2f} %",
            ]
        table.add_row(
            row.model,
            row.backend,
            f"{row.result.bits_per_weight:.3f}",
            megabytes(row.result.bytes),
            f"{row.result.bytes / row.result.bytes_before:.3f}",
            *measured,
            f"{row.quantize_seconds:.1f}"
            if not row.evaluate_seconds
            else f"{row.quantize_seconds:.1f} + {row.evaluate_seconds:.1f}",
            megabytes(row.peak_memory),
        )
    return table


class Reporter:
    """Progress and notes on stderr: bars on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False)

    def note(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, title: str) -> Iterator["Steps"]:
        """A context whose value is called with what is being done, how much of it is done, and how much there is."""
        if self.quiet:
            yield Steps(None, self.console, title, silent=True)
        elif self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self.console, transient=True) as bars:
                yield Steps(bars, self.console, title)
        else:
            yield Steps(None, self.console, title)


class Steps:
    """The callable that long steps report to."""

    def __init__(self, bars: Progress | None, console: Console, title: str, silent: bool = False) -> None:
        self.bars, self.console, self.title, self.silent = bars, console, title, silent
        self.tasks: dict[str, Any] = {}
        self.started: dict[str, float] = {}
        self.last_line = time.monotonic()
        # How many tokens one unit of a step stands for, where that is known.
        self.tokens_per_unit: dict[str, int] = {}
        # What a step has to say beside how far it is: a loss, a rate of its own.
        self.notes: dict[str, str] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.silent:
            return
        now = time.monotonic()
        self.started.setdefault(what, now)
        seconds = now - self.started[what]
        tokens = self.tokens_per_unit.get(what)
        rate = f"{done * tokens / seconds:.0f} tokens/s" if tokens and done and seconds > 0 else ""
        rate = self.notes.get(what, rate)
        if self.bars is not None:
            if what not in self.tasks:
                self.tasks[what] = self.bars.add_task(f"{self.title}: {what}", total=total, rate="")
            self.bars.update(self.tasks[what], completed=done, total=total, rate=rate)
        elif now - self.last_line >= PLAIN_SECONDS and total > 1:
            self.last_line = now
            left = f", about {seconds / done * (total - done):.0f} s left" if done else ""
            line = f"{self.title}: {what} {done}/{total}{', ' + rate if rate else ''}{left}"
            self.console.print(line, soft_wrap=True)


def inspect(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What is in a model folder, from headers alone: family, shapes, backend, bits per weight, bytes by part."""
    from qlm.load import block_paths, linear_paths, open_source

    source, empty = open_source(model, revision=revision)
    tensors = source.checkpoint.tensors
    sizes = {name: tensors[stored].bytes for name, stored in source.file_names.items() if stored in tensors}
    quantized = dict.fromkeys(source.scheme, 0)
    parts = {
        "quantized linears": 0,
        "other linears in blocks": 0,
        "embeddings and head": 0,
        "norms, biases and positions": 0,
    }
    linears = set(linear_paths(empty))
    for name, size in sizes.items():
        path = next((p for p in _owners(name) if p in source.scheme), name.rpartition(".")[0])
        is_bias = name.endswith(".bias")
        if path in quantized and not is_bias:
            quantized[path] += size
            parts["quantized linears"] += size
        elif path in linears and in_block(path) and not is_bias:
            parts["other linears in blocks"] += size
        elif (path in linears and not is_bias) or path.endswith(
            (source.spec.embedding, "wte", "embed_in", "embed_tokens")
        ):
            parts["embeddings and head"] += size
        else:
            parts["norms, biases and positions"] += size
    first = block_paths(source.spec, empty)[0]
    weights = sum(empty.get_submodule(path).weight.numel() for path in quantized)
    config = source.config
    # In a skeleton on the meta device a tied head is a parameter of its own.
    tied = f"{source.spec.head}.weight" if config.tie_word_embeddings else None
    return {
        "family": source.spec.model_type,
        "layers": getattr(config, source.spec.layers),
        "hidden_size": getattr(config, source.spec.hidden_size),
        "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "positions": getattr(config, source.spec.positions),
        "parameters": sum(p.numel() for name, p in empty.named_parameters() if name != tied),
        "dtype": str(source.dtype).removeprefix("torch."),
        "backend": source.backend.name if source.backend is not None else "none (float)",
        "quantized_linears": len(quantized),
        "linears": len(linears),
        # What the globs of a recipe match.
        "first_block": [path for path in linear_paths(empty) if path.startswith(f"{first}.")],
        "bits_per_weight": 8 * sum(quantized.values()) / weights if weights else 8.0 * source.dtype.itemsize,
        "bos": f"{source.spec.bos_id} at the start of every text" if source.spec.bos_first else "none",
        "bytes": sum(sizes.values()),
        "bytes_by_part": parts,
    }


def _owners(name: str) -> Iterator[str]:
    """The paths that a tensor's name starts with, longest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


# How facts are shown whose keys do not say their unit; the others as they are.
SHOWN: Mapping[str, Callable[[Any], str]] = {
    **dict.fromkeys(
        ("bytes", "weight_bytes_per_token", "memory", "quantize_memory", "evaluate_memory", "memory_available", "base_memory", "adapter_memory", "activation_memory", "disk", "disk_free"),
        megabytes,
    ),
    **dict.fromkeys(("kl_divergence", "kl_stderr"), lambda nats: f"{nats:.6g} nats"),
    **dict.fromkeys(("same_top1", "same_top1_stderr"), lambda share: f"{100 * share:.2f} %"),
    "length": lambda tokens: f"{tokens} tokens",
}  # fmt: skip
# Nested mappings of facts, by what their name ends with: a recipe's facts stand under its file. Names in other mappings are those of
# files, kernels or parts, and stay as they are.
FACTS_INSIDE = ("evaluation", ".yaml", ".yml")
# The same as SHOWN for all that is in a nested mapping.
SHOWN_INSIDE: Mapping[str, Callable[[Any], str]] = {"bytes_by_part": megabytes}


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Two columns: name and value; nested mappings are indented, and what is None is left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")

    def add(values: Mapping[str, Any], indent: str, are_facts: bool, show_all: Callable[[Any], str] | None) -> None:
        for name, value in values.items():
            shown = indent + (name.replace("_", " ") if are_facts and name.isidentifier() else name)
            show = show_all or SHOWN.get(name)
            if isinstance(value, Mapping):
                table.add_row(shown, "")
                add(value, indent + "  ", name.endswith(FACTS_INSIDE), SHOWN_INSIDE.get(name))
            elif value is None:
                continue
            elif show is not None:
                table.add_row(shown, show(value))
            elif isinstance(value, float):
                table.add_row(shown, f"{value:.6g}")
            elif isinstance(value, Sequence) and not isinstance(value, str):
                table.add_row(shown, "\n".join(map(str, value)))
            else:
                table.add_row(shown, str(value))

    add(facts, "", True, None)
    return table


def output_console() -> Console:
    """Results go to stdout. Where that is no terminal, tables keep their full width."""
    # Names of files and models are no markup.
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 200)
