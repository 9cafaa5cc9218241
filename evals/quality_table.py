"""The figures of quality.py in tables: means and spreads over calibration seeds."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from quality_sides import IN_WORDS, PRESETS

# Other software first, then qlm's presets as they rise.
ORDER = ("float", "rtn", "bitsandbytes", "torch", "gptqmodel", "autoround", *(f"qlm-{p}" for p in PRESETS))


# Whose KL is set against whose, format by format, at the same bytes.
BESIDE = (
    ("qlm-balanced", "gptqmodel", ("4bit", "3bit", "2bit")),
    ("qlm-best", "autoround", ("4bit", "3bit", "2bit")),
    ("qlm-best", "bitsandbytes", ("nf4",)),
    ("qlm-balanced", "torch", ("int8",)),
)
# The side of mixed precision, and those of one width for all that it is compared with.
MIXED, UNIFORM = "qlm-balanced-mixed", ("qlm-balanced-3bit", "qlm-balanced-4bit")


def is_ablation(side: str) -> bool:
    return "-no-" in side


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation over seeds; the latter None for fewer than two."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def summary_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """checkpoint -> side -> figures over seeds: mean and spread of each, and the mean of the standard error of KL."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            cells.setdefault((row["checkpoint"], row["side"]), []).append(row)
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for (checkpoint, side), found in cells.items():
        figures: dict[str, Any] = {
            "seeds": len(found), "versions": len({row["version"] for row in found}), "who": found[0]["who"], "format": found[0]["format"],
        }  # fmt: skip
        for name in ("kl", "perplexity", "same_top1", "bits_per_weight", "bytes", "seconds"):
            figures[name], figures[f"{name}_spread"] = mean_and_spread([row[name] for row in found])
        figures["kl_stderr"] = mean_and_spread([row["kl_stderr"] for row in found])[0]
        summary.setdefault(checkpoint, {})[side] = figures
    for of_checkpoint in summary.values():
        if of_checkpoint.keys() >= {MIXED, *UNIFORM}:
            mixed = of_checkpoint[MIXED]
            mixed["kl_over_interpolated"] = mixed["kl"] / interpolated_kl(
                mixed["bits_per_weight"], *(of_checkpoint[side] for side in UNIFORM)
            )
    return summary


def interpolated_kl(bits: float, *ends: Mapping[str, Any]) -> float:
    """KL at that many stored bits per weight on the line between two sides, in log KL."""
    (low, low_kl), (high, high_kl) = ((end["bits_per_weight"], end["kl"]) for end in ends)
    share = (bits - low) / (high - low)
    return math.exp((1 - share) * math.log(low_kl) + share * math.log(high_kl))


def ratio_of(
    rows: Iterable[Mapping[str, Any]], checkpoint: str, ours: str, theirs: str, version: str | None = None
) -> tuple[float, int] | None:
    """Mean KL of one side over that of another, and how many calibration seeds that is: those that both have, of one version if one is
    given."""
    known = [row for row in rows if "error" not in row and row["checkpoint"] == checkpoint]
    known = [row for row in known if version in (None, row["version"])]
    of_ours, of_theirs = ({row["seed"]: row["kl"] for row in known if row["side"] == side} for side in (ours, theirs))
    # What does not calibrate has one cell, for all seeds.
    seeds = [seed for seed in of_ours if seed in of_theirs or None in of_theirs]
    if not seeds:
        return None
    kl = statistics.fmean(of_ours[seed] for seed in seeds)
    return kl / statistics.fmean(of_theirs.get(seed, of_theirs.get(None)) for seed in seeds), len(seeds)


def beside_others(rows: Sequence[Mapping[str, Any]], checkpoints: Sequence[str]) -> list[str]:
    """The lines of a table of KL over another's; [] where there is nothing to compare."""
    lines = []
    for ours, theirs, formats in BESIDE:
        for name in formats:
            found = [ratio_of(rows, checkpoint, f"{ours}-{name}", f"{theirs}-{name}") for checkpoint in checkpoints]
            if any(found):
                shown = ["" if each is None else f"{each[0]:.2f} ({each[1]})" for each in found]
                lines.append(f"| {IN_WORDS[name]}: {ours} over {theirs} | {' | '.join(shown)} |")
    return lines


def in_table(value: float, spread: float | None) -> str:
    """Three digits that count, and the spread with as many places."""
    places = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 4
    return f"{value:.{places}f}" + ("" if spread is None else f" ± {spread:.{places}f}")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown: KL, perplexity and same-top-1 by format; KL over others'; sizes and times; ablations."""
    summary = summary_of(rows)
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    columns = " | ".join(checkpoints)
    rule = "|---" * (len(checkpoints) + 1) + "|"
    main = [f"| KL in nats · perplexity · same top-1 | {columns} |", rule]
    sizes = [f"| bits per weight · MB · seconds | {columns} |", rule]
    ablations = [f"| KL in nats (over that of best) | {columns} |", rule]

    def line(label: str, side: str, show: Callable[[str, dict[str, Any]], str]) -> str:
        shown = [
            show(checkpoint, summary[checkpoint][side]) if side in summary[checkpoint] else "" for checkpoint in checkpoints
        ]  # fmt: skip
        return f"| {label} | " + " | ".join(shown) + " |"

    def quality(checkpoint: str, found: dict[str, Any]) -> str:
        mixed = "*" if found["versions"] > 1 else ""
        parts = [] if found["kl"] is None else [in_table(found["kl"], found["kl_spread"]) + mixed]
        parts.append(f"{found['perplexity']:.2f}")
        shown = " · ".join(parts if found["same_top1"] is None else [*parts, f"{found['same_top1']:.1%}"])
        ratio = found.get("kl_over_interpolated")
        return shown if ratio is None else f"{shown} ({ratio:.3f})"

    def size(checkpoint: str, found: dict[str, Any]) -> str:
        bits = "" if found["bits_per_weight"] is None else f"{found['bits_per_weight']:.2f}"
        seconds = "" if found["seconds"] is None else in_table(found["seconds"], None)
        return " · ".join(part for part in (bits, f"{found['bytes'] / 1e6:.2f}", seconds) if part)

    def beside_best(best: str, side: str, checkpoint: str, found: dict[str, Any]) -> str:
        """KL, and its ratio to `best`'s over the calibration seeds that both have; none where sources differ."""
        versions = {row["version"] for row in rows if (row["checkpoint"], row["side"]) == (checkpoint, side)}
        ratio = ratio_of(rows, checkpoint, side, best, versions.pop()) if len(versions) == 1 else None
        return in_table(found["kl"], found["kl_spread"]) + ("" if ratio is None else f" ({ratio[0]:.3f})")

    for name, words in IN_WORDS.items():
        known = {
            side: found["who"]
            for checkpoint in checkpoints
            for side, found in summary.get(checkpoint, {}).items()
            if found["format"] == name
        }
        ordered = sorted(
            known, key=lambda side: next((i for i, start in enumerate(ORDER) if side.startswith(start)), 99)
        )
        plain = [side for side in ordered if not is_ablation(side)]
        if plain and name != "float":
            main.append(f"| **{words}** |" + " |" * len(checkpoints))
            sizes.append(f"| **{words}** |" + " |" * len(checkpoints))
        main += [line(known[side], side, quality) for side in plain]
        sizes += [line(known[side], side, size) for side in plain]
        without = [side for side in ordered if is_ablation(side)]
        if without:
            best = f"qlm-best-{name}"
            ablations += [
                f"| **{words}** |" + " |" * len(checkpoints),
                line("best", best, lambda _, found: in_table(found["kl"], found["kl_spread"])),
            ]
            ablations += [
                line(side.removeprefix(f"{best}-").replace("-", " ", 1), side, partial(beside_best, best, side)) for side in without
            ]  # fmt: skip
    errors = [
        found["kl_stderr"] / found["kl"] for each in summary.values() for found in each.values() if found["kl_stderr"]
    ]
    note = f"Standard errors of KL over windows of text are at most {max(errors):.1%} of it." if errors else ""
    if any(found["versions"] > 1 for each in summary.values() for found in each.values()):
        note += " \\*: seeds measured with different sources."
    ratios = beside_others(rows, checkpoints)
    if ratios:
        ratios = [f"| KL over another's (calibration seeds) | {columns} |", rule, *ratios]
    parts = [
        "\n".join(main),
        note,
        "\n".join(ratios),
        "\n".join(sizes),
        "\n".join(ablations) if len(ablations) > 2 else "",
    ]
    return "\n\n".join(part for part in parts if part)
