"""Lines are where the axes' numbers say, and readable on both backgrounds."""

import math
import random
import re
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from qlm.training.line_chart import MOST_POINTS, STYLE, WIDTH, Line, line_chart

SVG = "{http://www.w3.org/2000/svg}"
HEIGHT = 300
# Coordinates have two decimals; of a pixel.
PRECISION = 0.02


def of_class(root: ElementTree.Element, *names: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if set(names) <= set(element.get("class", "").split())]


def scale(marks: list[tuple[float, float]]) -> tuple[float, float]:
    """Value at coordinate 0 and per pixel, from (coordinate, number beside it) of an axis's first and last mark."""
    (first, low), (last, high) = marks[0], marks[-1]
    per_pixel = (high - low) / (last - first)
    return low - first * per_pixel, per_pixel


def points_in(root: ElementTree.Element, kind: str) -> Iterator[tuple[float, float, float, float]]:
    """(step, value, step's and value's precision) of each point of a line, by the numbers at the axes alone."""
    texts = [element for element in root.iter(f"{SVG}text") if element.get("text-anchor") in ("end", "middle")]
    numbers = [element for element in texts if re.fullmatch(r"-?\d[\d.e+-]*", element.text or "")]
    below = [(float(e.get("x", "")), float(e.text or "")) for e in numbers if e.get("text-anchor") == "middle"]
    beside = [(float(e.get("y", "")) - 4, float(e.text or "")) for e in numbers if e.get("text-anchor") == "end"]
    (x0, x_unit), (y0, y_unit) = scale(below), scale(beside)
    (line,) = of_class(root, "line", kind)[-1:]
    for point in line.get("points", "").split():
        x, y = map(float, point.split(","))
        yield x0 + x * x_unit, y0 + y * y_unit, abs(x_unit) * PRECISION, abs(y_unit) * PRECISION


@pytest.mark.parametrize(
    ("low", "spread"), [(0.0, 3e-4), (1e-5, 3e-4), (2.5, 3e-4), (0.0, 1.0), (-2.5, 5.0), (2.5, 700.0), (1e6, 700.0)]
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_points_are_where_the_axes_say(low: float, spread: float, from_zero: bool) -> None:
    chance = random.Random(0)
    points = [(step, low + spread * chance.random()) for step in range(7, 60)]
    root = ElementTree.fromstring(
        line_chart([Line("a", "each", points)], title="t", unit="u", height=HEIGHT, from_zero=from_zero)
    )
    found = list(points_in(root, "each"))
    assert len(found) == len(points)
    for (step, value), (x, y, x_precision, y_precision) in zip(points, found, strict=True):
        assert x == pytest.approx(step, abs=2 * x_precision)
        assert y == pytest.approx(value, abs=2 * y_precision)
    everything = [float(number) for e in of_class(root, "line") for number in re.split("[ ,]", e.get("points", ""))]
    assert 0 <= min(everything) <= max(everything) <= WIDTH


def test_one_point() -> None:
    lines = [Line("each", "each", [(1, 2.5)]), Line("smooth", "smooth", [(1, 2.5)]), Line("none", "measured", [])]
    root = ElementTree.fromstring(line_chart(lines, title="t", unit="u", height=HEIGHT))
    assert of_class(root, "line") == [e for e in of_class(root, "line") if e.tag == f"{SVG}line"]
    dots = list(root.iter(f"{SVG}circle"))
    assert len(dots) == 2
    assert all(0 < float(dot.get("cx", "")) < WIDTH and 0 < float(dot.get("cy", "")) < HEIGHT for dot in dots)
    # A line without points is not in the legend.
    assert {"each", "smooth"} == {e.text for e in root.iter(f"{SVG}text") if e.text in ("each", "smooth", "none")}


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-300, 1e300])
def test_equal_values(value: float) -> None:
    svg = line_chart([Line("a", "smooth", [(0, value), (5, value)])], title="t", unit="u", height=HEIGHT)
    (line,) = of_class(ElementTree.fromstring(svg), "smooth")
    heights = {float(point.split(",")[1]) for point in line.get("points", "").split()}
    assert len(heights) == 1
    assert 0 < heights.pop() < HEIGHT


@pytest.mark.parametrize("points", [[], [(1, math.nan)], [(1, 1.0), (2, math.inf)]])
def test_nothing_to_draw(points: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="the loss: expected points with finite values"):
        line_chart([Line("a", "each", points)], title="the loss", unit="u", height=HEIGHT)


def test_words_are_escaped() -> None:
    words = '<b> & "c"'
    svg = line_chart(
        [Line(words, "each", [(1, 1.0)]), Line("b", "smooth", [(1, 1.0)])], title=words, unit=words, height=99
    )
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == words
    assert [element.text for element in root.iter(f"{SVG}text")].count(words) == 3
    assert "<b>" not in svg


def test_long_runs_keep_their_peaks() -> None:
    chance = random.Random(0)
    points = [(step, chance.random()) for step in range(100_000)]
    points[77_777] = (77_777, 9.0)
    points[33_333] = (33_333, -9.0)
    svg = line_chart([Line("a", "each", points)], title="t", unit="u", height=HEIGHT)
    found = list(points_in(ElementTree.fromstring(svg), "each"))
    assert len(found) <= MOST_POINTS
    steps = [step for step, *_ in found]
    assert steps == sorted(steps)
    for value, wanted in ((max, (77_777, 9.0)), (min, (33_333, -9.0))):
        step, height, x_precision, y_precision = value(found, key=lambda point: point[1])
        assert step == pytest.approx(wanted[0], abs=2 * x_precision)
        assert height == pytest.approx(wanted[1], abs=2 * y_precision)


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance of sRGB."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(dark: bool) -> None:
    """WCAG 2.2: 3:1 for what is drawn, 4.5:1 for words."""
    pieces = re.split(r"@media[^{]*\{(.*?)\n\}", STYLE, flags=re.DOTALL)
    styles = "".join(pieces[1::2] if dark else pieces[::2])
    rules = dict(re.findall(r"\.([\w.]+) \{[^}]*?(?:fill|stroke): (#\w{6})", styles))
    paper = rules["paper"]
    for name in ("each", "smooth", "measured", "each.dot", "smooth.dot", "measured.dot"):
        assert contrast(rules[name], paper) >= 3, name
    for name in ("ink", "faint"):
        assert contrast(rules[name], paper) >= 4.5, name
