"""The figures of transformers' page on OPT, and gpu_tables.py's beside them: what is measured alike, and how much faster or smaller it is.

The page: transformers' docs/source/en/model_doc/opt.md, "Using Scaled Dot Product Attention (SDPA)", as the pull request
huggingface/transformers#33298 left it in 2024; it has been written anew since, without them. facebook/opt-350m in float16 on an L40S of
45 GB with torch 2.4.0, eager attention and SDPA. The scripts, the pull request says, are those of #31031, which are fxmarty's: gists
7e75cc3942d6974e4849093ebea0a331 (training) and 5113e4304fbdd38c9c3702ce44683f6a (inference). How these count is read off copies of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_tables_page import Row, number, table
from gpu_tables_page import page as plain_page

SHAPE = "opt-350m"
# Tokens that the page's script lets `generate` make of each prompt.
NEW = 100
MB_OF_MIB = 2**20 / 1e6


@dataclass(frozen=True)
class Figures:
    """A line of the page. Times in milliseconds: of a batch in training, of a token in inference; memory in MB of 10^6 bytes; None: out of it.

    `faster` and `saved` are the page's own, of unrounded figures, in percent: (eager / SDPA - 1) * 100.
    """

    eager_ms: float | None
    sdpa_ms: float
    faster: float | None
    eager_mb: float | None
    sdpa_mb: float
    saved: float | None


# By batch and tokens.
TRAINING = {
    (1, 128): Figures(47.0, 37.0, 26.36, 1474.611, 1474.32, 0.019),
    (1, 256): Figures(46.0, 37.0, 24.335, 1498.541, 1499.49, -0.063),
    (1, 512): Figures(46.0, 37.0, 24.959, 1973.544, 1551.35, 27.215),
    (1, 1024): Figures(62.0, 38.0, 65.135, 4867.113, 1698.35, 186.578),
    (1, 2048): Figures(230.0, 39.0, 483.933, 15662.224, 2715.75, 476.718),
    (2, 128): Figures(45.0, 37.0, 20.455, 1498.164, 1499.49, -0.089),
    (2, 256): Figures(46.0, 37.0, 24.027, 1569.367, 1551.35, 1.161),
    (2, 512): Figures(45.0, 37.0, 20.965, 3257.074, 1698.35, 91.778),
    (2, 1024): Figures(122.0, 38.0, 225.958, 9054.405, 2715.75, 233.403),
    (2, 2048): Figures(464.0, 67.0, 593.646, 30572.058, 4750.55, 543.548),
    (4, 128): Figures(45.0, 37.0, 21.918, 1549.448, 1551.35, -0.123),
    (4, 256): Figures(44.0, 38.0, 18.084, 2451.768, 1698.35, 44.361),
    (4, 512): Figures(69.0, 37.0, 84.421, 5833.18, 2715.75, 114.791),
    (4, 1024): Figures(262.0, 62.0, 319.475, 17427.842, 4750.55, 266.86),
    (4, 2048): Figures(None, 62.0, None, None, 4750.55, None),
    (8, 128): Figures(44.0, 37.0, 18.436, 2049.115, 1697.78, 20.694),
    (8, 256): Figures(48.0, 36.0, 32.887, 4222.567, 2715.75, 55.484),
    (8, 512): Figures(153.0, 60.0, 154.862, 10985.391, 4750.55, 131.245),
    (8, 1024): Figures(526.0, 122.0, 330.697, 34175.763, 8821.18, 287.428),
    (8, 2048): Figures(None, 122.0, None, None, 8821.18, None),
}
# SDPA's figures here are the page's for 1024 tokens, though (4, 2048) are as many tokens as (8, 1024), which take twice as much.
REPEATED = ((4, 2048), (8, 2048))
INFERENCE = {
    (1, 128): Figures(11.634, 8.647, 34.546, 717.676, 717.674, 0.0),
    (1, 256): Figures(11.593, 8.86, 30.851, 742.852, 742.845, 0.001),
    (1, 512): Figures(11.515, 8.816, 30.614, 798.232, 799.593, -0.17),
    (1, 1024): Figures(11.556, 8.915, 29.628, 917.265, 895.538, 2.426),
    (2, 128): Figures(12.724, 11.002, 15.659, 762.434, 762.431, 0.0),
    (2, 256): Figures(12.704, 11.063, 14.83, 816.809, 816.733, 0.009),
    (2, 512): Figures(12.757, 10.947, 16.535, 917.383, 918.339, -0.104),
    (2, 1024): Figures(13.018, 11.018, 18.147, 1162.65, 1114.81, 4.291),
    (4, 128): Figures(12.739, 10.959, 16.243, 856.335, 856.483, -0.017),
    (4, 256): Figures(12.718, 10.837, 17.355, 957.298, 957.674, -0.039),
    (4, 512): Figures(12.813, 10.822, 18.393, 1158.44, 1158.45, -0.001),
    (4, 1024): Figures(13.416, 11.06, 21.301, 1653.42, 1557.19, 6.18),
    (8, 128): Figures(12.763, 10.891, 17.193, 1036.13, 1036.51, -0.036),
    (8, 256): Figures(12.89, 11.104, 16.085, 1236.98, 1236.87, 0.01),
    (8, 512): Figures(13.327, 10.939, 21.836, 1642.29, 1641.78, 0.031),
    (8, 1024): Figures(15.181, 11.175, 35.848, 2634.98, 2443.35, 7.843),
}

ALIKE = f"""The page's figures are of an L40S with torch 2.4.0, ours of the machine above: ours over the page's says what both, machine and
software, come to. "Faster" and "saved" are the page's: (eager / SDPA - 1) * 100. Inference: the page times `generate` of {NEW} new tokens,
greedy, prompt included, by the GPU's clock, and divides by {NEW}, whatever the batch; the mean of 50. Ours is counted alike, (prefill +
{NEW - 1} steps) / {NEW}, from the medians of both; but it has not what `generate` does between its forward passes, and its steps are the first
behind the prompt. Training: the page takes the sum of the logits for a loss; ours here is measured so too, without the page's mask of ones, and
is not that of the tables above. \\*: the page repeats here the SDPA figures of half as many tokens."""


def token_ms(row: Row) -> float:
    """Time of a token as the page counts it: of everything that makes `NEW` of them."""
    return float((row["prefill_ms"] + (NEW - 1) * row["step_ms"]) / NEW)


def mb(mib: float | None) -> float | None:
    return None if mib is None else mib * MB_OF_MIB


def over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def percent(a: float | None, b: float | None) -> float | None:
    """What the page calls speedup and memory saved."""
    return None if a is None or b is None else 100 * (a / b - 1)


@dataclass(frozen=True)
class Comparison:
    """One of the page's tables, and what of a row of ours stands beside it. `sides`: what is called so, and the row's keys that say it."""

    part: str
    figures: dict[tuple[int, int], Figures]
    what: str
    eager: Callable[[Figures], float | None]
    sdpa: Callable[[Figures], float]
    gain: Callable[[Figures], float | None]
    gained: str
    ours: Callable[[Row], float | None]
    sides: dict[str, dict[str, str]]


_DECODED = {
    "eager": {"attention": "eager", "loop": "growing"}, "SDPA": {"attention": "sdpa", "loop": "growing"},
    "SDPA, recorded": {"attention": "sdpa", "loop": "recorded"},
}  # fmt: skip
_TRAINED = {"eager": {"attention": "eager", "base": "trained"}, "SDPA": {"attention": "sdpa", "base": "trained"}}

COMPARISONS = (
    Comparison(
        "inference", INFERENCE, "ms a token", lambda page: page.eager_ms, lambda page: page.sdpa_ms, lambda page: page.faster,
        "faster %", token_ms, _DECODED,
    ),
    Comparison(
        "inference", INFERENCE, "MB at most", lambda page: page.eager_mb, lambda page: page.sdpa_mb, lambda page: page.saved,
        "saved %", lambda row: mb(row["peak_mib"]), _DECODED,
    ),
    Comparison(
        "training", TRAINING, "ms a batch", lambda page: page.eager_ms, lambda page: page.sdpa_ms, lambda page: page.faster,
        "faster %", lambda row: row.get("page_batch_ms"), _TRAINED,
    ),
    Comparison(
        "training", TRAINING, "MB at most", lambda page: page.eager_mb, lambda page: page.sdpa_mb, lambda page: page.saved,
        "saved %", lambda row: mb(row.get("page_peak_mib")), _TRAINED,
    ),
)  # fmt: skip


def beside(rows: Iterable[Row], one: Comparison) -> str | None:
    """A line for each of the page's that we have a figure for, or None where there is none."""
    found: dict[str, dict[tuple[int, int], float | None]] = {name: {} for name in one.sides}
    for row in rows:
        # The page's figures are of float16.
        if row["ok"] is not True or (row["part"], row["shape"]) != (one.part, SHAPE):
            continue
        if (row["weights"], row["dtype"]) != ("float", "float16"):
            continue
        for name, keys in one.sides.items():
            if all(row.get(key) == value for key, value in keys.items()):
                found[name][row["batch"], row["tokens"]] = one.ours(row)
    lines = []
    for size, page in one.figures.items():
        ours = {name: found[name].get(size) for name in one.sides}
        if all(figure is None for figure in ours.values()):
            continue
        star = "\\*" if one.part == "training" and size in REPEATED else ""
        eager, sdpa = one.eager(page), one.sdpa(page)
        lines.append([
            *map(str, size), "oom" if eager is None else number(eager), number(sdpa) + star, number(one.gain(page)),
            *(number(figure) for figure in ours.values()), number(percent(ours["eager"], ours["SDPA"])),
            *(number(over(figure, eager if name == "eager" else sdpa)) for name, figure in ours.items()),
        ])  # fmt: skip
    head = [
        "batch", "tokens", "page: eager", "page: SDPA", f"page: {one.gained}", *one.sides, one.gained,
        *(f"{name} over the page's" for name in one.sides),
    ]  # fmt: skip
    return table(head, lines) if lines else None


def comparison(rows: Sequence[Row]) -> list[str]:
    """Paragraphs: ours beside the page's, if there are any."""
    tables = [(one, beside(rows, one)) for one in COMPARISONS]
    parts = [
        text for one, found in tables if found is not None for text in (f"### {SHAPE}, {one.part}: {one.what}", found)
    ]
    return ["## Beside transformers' page on OPT", ALIKE, *parts] if parts else []


def full_page(report: dict[str, Any]) -> str:
    """gpu_tables_page's, then ours beside the page's."""
    return "\n\n".join([plain_page(report).rstrip("\n"), *comparison(report["rows"])]) + "\n"
