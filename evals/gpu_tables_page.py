"""What evals/gpu_tables.py found, as Markdown: goals, then for each shape inference and training, time and memory."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

# What a column is called. The decoding loop "growing" is transformers' own way, a cache that grows.
ATTENTIONS = {"eager": "eager", "sdpa": "SDPA", "flash_attention_2": "flash-attn"}
LIBRARIES = ("torch", "transformers", "triton", "bitsandbytes", "flash-attn", "qlm")

LEGEND = """A step gives every sequence of the batch one token, by greedy choice; its time is the median over rounds. "Recorded" are qlm's steps of
fixed shape (a CUDA graph on a GPU), the others transformers' forward pass with a cache that grows, in the same loop. A training step is a
forward pass with its loss and a backward pass, without an optimizer, dropout as configured. Memory is the most that torch had allocated,
weights included. Quantized models run SDPA. "oom": out of memory; "-": not measured."""
TRAINING = """By its attention: float weights that are all trained, a forward pass with its loss, cross entropy, and a backward pass. By its weights: a
frozen base. No weight gets a gradient, and the backward pass goes through all blocks to the output of the input embedding, what an adapter
in the first block needs without its own products. Quantized weights know no other training; "frozen float" is theirs to compare with.
flash-attn has no wheel that could be carried to a machine without a network: without a column of it here nothing of it has been measured."""


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def shown(row: Row | None, key: str) -> str:
    if row is None:
        return "-"
    if row["ok"] is True:
        return number(row.get(key))
    if row["ok"] is None:
        return "oom" if row["not_run"] == "out of memory" else "-"
    return "differs" if "Differs" in row["error"] else "failed"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    marks = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *lines))


def grid(rows: Sequence[Row], columns: dict[tuple[str, ...], str], of: Sequence[str], key: str) -> str:
    """A table of `key`: a line for each batch and number of tokens, a column for each combination of the keys `of`; columns in which
    nothing could be run stay away."""
    found = {(tuple(row[name] for name in of), row["batch"], row["tokens"]): row for row in rows}
    ran = {column for (column, _, _), row in found.items() if shown(row, key) != "-"}
    kept = [column for column in columns if column in ran]
    sizes = sorted({(batch, tokens) for _, batch, tokens in found})
    return table(
        ["batch", "tokens", *(columns[column] for column in kept)],
        (
            [str(batch), str(tokens), *(shown(found.get((column, batch, tokens)), key) for column in kept)]
            for batch, tokens in sizes
        ),
    )


def columns_of(rows: Sequence[Row], of: Sequence[str]) -> dict[tuple[str, ...], str]:
    """The columns in the order of measuring, and what they are called."""
    found: dict[tuple[str, ...], str] = {}
    for row in rows:
        name = ATTENTIONS[row["attention"]] if row["weights"] == "float" else row["weights"]
        found[tuple(row[key] for key in of)] = name + (", recorded" if row.get("loop") == "recorded" else "")
    return found


def goals_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        for goal in row.get("goals", ()):
            verdict = "-" if goal["met"] is None else "yes" if goal["met"] else "no"
            if goal["met"] and goal["aim_met"]:
                verdict = "yes, and the aim"
            lines.append([goal["what"], number(goal["found"]), number(goal["goal"]), number(goal["aim"]), verdict])
        if row["ok"] is not True:
            lines.append([row["name"], row.get("not_run") or row["error"], "", "", "-"])
    return table(["what", "found", "at least", "aim", "met"], lines)


def page(report: dict[str, Any]) -> str:
    rows: list[Row] = report["rows"]
    parts = ["# Speed and memory on a GPU", LEGEND]
    for index in sorted({row["run"] for row in rows}):
        run = report["runs"][index]
        machine, versions = run["machine"], run["versions"]
        libraries = ", ".join(f"{name} {versions[name]}" for name in LIBRARIES if versions.get(name))
        kernels = "".join(f" {op}: {kernel}." for op, kernel in machine.get("kernels", {}).items())
        parts.append(f"{machine['device']}, driver {machine['driver']}, CUDA {machine['cuda']}; {libraries}.{kernels}")
    goals = [row for row in rows if row["part"] == "goals"]
    if goals:
        parts += ["## Goals", goals_table(goals)]
    of = {"inference": ("weights", "attention", "loop"), "training": ("weights", "attention")}
    what = {
        "inference": {"step_ms": "ms a step", "prefill_ms": "ms to read the prompt", "peak_mib": "MiB at most"},
        "training": {"batch_ms": "ms a batch", "peak_mib": "MiB at most"},
    }
    for shape in dict.fromkeys(row["shape"] for row in rows if row["part"] in of):
        for part, keys in what.items():
            own = [row for row in rows if row["part"] == part and row["shape"] == shape]
            # A CPU has no peak.
            for key, title in keys.items():
                if not any(row.get(key) is not None for row in own):
                    continue
                parts.append(f"## {shape}, {own[0]['dtype']}, {part}: {title}")
                parts.append(grid(own, columns_of(own, of[part]), of[part], key))
    sdpa = [row for row in rows if row["part"] == "training" and row["attention"] == "sdpa" and row["ok"] is True]
    if sdpa:
        flash = sum(row["flash"] is True for row in sdpa)
        chosen = ", ".join(dict.fromkeys(row["sdpa_backend"] for row in sdpa if "sdpa_backend" in row))
        others = dict.fromkeys(str(row["flash"]) for row in sdpa if row["flash"] is not True)
        parts.append(
            f"Training by SDPA ran on its flash backend, no other being allowed, in {flash} of {len(sdpa)} cells."
            + (f" Left to itself it chooses: {chosen}." if chosen else "")
            + "".join(f" Else: {why}." for why in others)
        )
    notes = dict.fromkeys(
        f"{row['name']}: {row['error']}"
        if row["ok"] is False
        else f"{row['weights']}, {row['attention']}: {row['not_run']}"
        for row in rows
        if row["ok"] is not True and row["part"] in of and row.get("not_run") != "out of memory"
    )
    if notes:
        parts.append("Not there, and why:\n\n" + "\n".join(f"- {note}" for note in notes))
    if report["left_out"]:
        parts.append(f"Left out, the time being over: {len(report['left_out'])} cells.")
    if any(row["part"] == "training" for row in rows):
        parts += ["## What training is", TRAINING]
    return "\n\n".join(parts) + "\n"
