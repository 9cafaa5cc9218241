"""Lines over steps as an SVG to stand inside an HTML page, whose `<style>` holds `STYLE`. Text in, text out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from qlm import figure

# Line colours keep a contrast of 3:1 or more to both papers, and the lines differ in form as well: dashed, with dots, thick and thin.
STYLE = (
    figure.STYLE
    + """
.grid { stroke: #d1d9e0; stroke-width: 1; }
.line { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.each { stroke: #7896be; stroke-width: 1; }
.smooth { stroke: #0b57d0; stroke-width: 2.2; }
.measured { stroke: #b3470a; stroke-width: 1.8; stroke-dasharray: 6 4; }
.dot { stroke: none; }
.each.dot { fill: #7896be; }
.smooth.dot { fill: #0b57d0; }
.measured.dot { fill: #b3470a; }
@media (prefers-color-scheme: dark) {
  .grid { stroke: #30363d; }
  .each { stroke: #5d7bab; }
  .smooth { stroke: #79b8ff; }
  .measured { stroke: #f0883e; }
  .each.dot { fill: #5d7bab; }
  .smooth.dot { fill: #79b8ff; }
  .measured.dot { fill: #f0883e; }
}
"""
)
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 880, 74, 30, 44, 44
# A line with more points than this many is drawn by the lowest and the highest of each of half as many stretches.
MOST_POINTS = 2 * (WIDTH - LEFT - RIGHT)


@dataclass(frozen=True)
class Line:
    """A line through points (step, value), steps rising. kind: `each`, `smooth` or `measured`, which looks, in this order, fainter, thicker,
    and dashed with a dot at each point."""

    name: str
    kind: str
    points: Sequence[tuple[int, float]]


def line_chart(lines: Sequence[Line], *, title: str, unit: str, height: int, from_zero: bool = False) -> str:
    """The SVG: axes with numbers, a legend, the lines one over the other.

    Args:
        title: what is drawn. unit: of the values. height: of the whole, in pixels.
        from_zero: whether the axis of the values begins at 0.
    Raises:
        ValueError: there is no point, or a value that is not finite.
    """
    points = [point for line in lines for point in line.points]
    if not points or not all(math.isfinite(value) for _, value in points):
        raise ValueError(f"{title}: expected points with finite values")
    steps, values = [step for step, _ in points], [value for _, value in points]
    x_low, x_high = _widened(min(steps), max(steps), 1.0)
    y_low, y_high = _widened(*((0.0, max(values)) if from_zero else (min(values), max(values))), 0.05)
    bottom, right = height - BOTTOM, WIDTH - RIGHT

    def x(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (right - LEFT)

    def y(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - TOP)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img" '
        f"aria-label={quoteattr(title)}>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        f'<text class="ink" x="{LEFT}" y="24" font-size="15" font-weight="600">{escape(title)}</text>',
        *_legend([line for line in lines if line.points]),
    ]
    for tick in _ticks(y_low, y_high, 5, whole=False):
        out.append(f'<line class="grid" x1="{LEFT}" y1="{y(tick):.2f}" x2="{right}" y2="{y(tick):.2f}"/>')
        out.append(_number(tick, LEFT - 8, y(tick) + 4, "end"))
    for tick in _ticks(x_low, x_high, 8, whole=True):
        out.append(f'<line class="grid" x1="{x(tick):.2f}" y1="{bottom}" x2="{x(tick):.2f}" y2="{bottom + 5}"/>')
        out.append(_number(tick, x(tick), bottom + 19, "middle"))
    out.append(
        f'<text class="faint" x="{(LEFT + right) // 2}" y="{height - 8}" text-anchor="middle" font-size="12">step</text>'
    )
    out.append(
        f'<text class="faint" x="14" y="{(TOP + bottom) // 2}" text-anchor="middle" font-size="12" '
        f'transform="rotate(-90 14 {(TOP + bottom) // 2})">{escape(unit)}</text>'
    )
    for line in lines:
        out += _drawn(line, [(x(step), y(value)) for step, value in _thinned(line.points)])
    return "\n".join([*out, "</svg>"]) + "\n"


def _drawn(line: Line, points: Sequence[tuple[float, float]]) -> list[str]:
    out = []
    if len(points) > 1:
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
        out.append(f'<polyline class="line {line.kind}" points="{path}"/>')
    if len(points) == 1 or line.kind == "measured":
        out += [f'<circle class="dot {line.kind}" cx="{x:.2f}" cy="{y:.2f}" r="3"/>' for x, y in points]
    return out


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    if len(points) <= MOST_POINTS:
        return points
    stretches = MOST_POINTS // 2
    kept: list[tuple[int, float]] = []
    for number in range(stretches):
        stretch = points[number * len(points) // stretches : (number + 1) * len(points) // stretches]
        # Both in the order of their steps; one point when all are equal.
        kept += sorted({min(stretch, key=_value), max(stretch, key=_value)})
    return kept


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """Both ends apart from each other: when they are one, by that share of it; values get room above and below."""
    if low == high:
        room = abs(low) * share or 1.0
        return low - room, high + room
    room = 0.0 if share == 1.0 else (high - low) * share
    # An axis from 0 keeps its 0.
    return (low if low == 0 else low - room), high + room


def _ticks(low: float, high: float, most: int, *, whole: bool) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between the ends, about so many; whole ones for steps."""
    apart = 10.0 ** math.floor(math.log10((high - low) / most))
    apart = next(apart * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (apart * factor) <= most)
    apart = max(apart, 1.0) if whole else apart
    # As a quotient of whole numbers a tick is the double next to the number that is meant.
    return [number * apart for number in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


def _number(value: float, x: float, y: float, anchor: str) -> str:
    # A tick of 0.30000000000000004 is 0.3.
    text = f"{value:.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.6g}"
    return f'<text class="faint" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="12">{text}</text>'


def _legend(lines: Sequence[Line]) -> list[str]:
    """At the right of the title, from right to left."""
    if len(lines) < 2:
        return []
    out, right = [], WIDTH - RIGHT
    for line in reversed(lines):
        start = right - 30 - 7 * len(line.name)
        out.append(f'<line class="line {line.kind}" x1="{start}" y1="20" x2="{start + 24}" y2="20"/>')
        out.append(f'<text class="faint" x="{start + 30}" y="24" font-size="12">{escape(line.name)}</text>')
        right = start - 20
    return out
