"""Line charts as inline SVG, which take their colors from the page's style sheet."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

NUM_STYLES = 8
"""Colors of the style sheet; after these, lines are dashed."""
WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 40
MAX_POINTS = 400
"""Of a line; a longer one is thinned out."""


class Line(NamedTuple):
    """A line of a chart."""

    name: str
    style: int
    """The same number for the same system in all charts of a page."""
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    """Intervals of y; empty: none."""
    high: Sequence[float | None] = ()


def style_of(number: int) -> str:
    """Returns the classes of a line's style."""
    return f"s{number % NUM_STYLES}" + (" dashed" if number // NUM_STYLES % 2 else "")


def line_chart(
    lines: Sequence[Line], title: str, x_label: str, y_label: str, *, markers: bool = False
) -> str:  # fmt: skip
    """Returns a chart of the lines as an SVG element with a title for screen readers.

    Args:
        markers: mark the points, with their intervals.
    """
    thin = [_thinned(line) for line in lines]
    x_ticks = ticks([value for line in thin for value in line.x])
    y_values = [v for line in thin for v in (*line.y, *line.low, *line.high) if v is not None]
    y_ticks = ticks(y_values)

    def x_of(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y_of(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'class="chart"><title>{escape(title)}</title>'
    ]
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in y_ticks:
        y = y_of(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" class="end">{_label(value)}</text>')
    for value in x_ticks:
        x = x_of(value)
        parts.append(f'<path class="grid" d="M{x} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 15}" class="middle">{_label(value)}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="middle">{escape(x_label)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(12 {middle}) rotate(-90)" class="middle">{escape(y_label)}'
        "</text>"
    )
    for line in thin:
        path = "L".join(f"{x_of(x)} {y_of(y)}" for x, y in zip(line.x, line.y, strict=True))
        name = f"<title>{escape(line.name)}</title>"
        parts.append(f'<path class="line {style_of(line.style)}" d="M{path}">{name}</path>')
        if markers or len(line.x) == 1:
            for x, y in zip(line.x, line.y, strict=True):
                point = f"{line.name}: {x_label} {_label(x)}, {y_label} {y:.4g}"
                parts.append(
                    f'<circle class="dot {style_of(line.style)}" cx="{x_of(x)}" cy="{y_of(y)}" '
                    f'r="3"><title>{escape(point)}</title></circle>'
                )
            for x, low, high in zip(line.x, line.low, line.high, strict=False):
                if low is not None and high is not None:
                    bar = f"M{x_of(x)} {y_of(low)}V{y_of(high)}"
                    parts.append(f'<path class="bar {style_of(line.style)}" d="{bar}"/>')
    return "".join(parts) + "</svg>"


def distribution(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns x and y of the empirical cumulative distribution, as a line with steps."""
    ordered = np.sort(np.asarray(values, np.float64))
    share = np.arange(1, ordered.size + 1) / ordered.size
    if ordered.size > MAX_POINTS // 2:
        chosen = np.linspace(0, ordered.size - 1, MAX_POINTS // 2).round().astype(int)
        ordered, share = ordered[chosen], share[chosen]
    x = np.repeat(ordered, 2)
    y = np.concatenate([[0.0], np.repeat(share, 2)[:-1]])
    return x.tolist(), y.tolist()


def ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """Returns about `count` multiples of 1, 2 or 5 times a power of ten that enclose the values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _label(value: float) -> str:
    if value and (abs(value) >= 10_000 or abs(value) < 0.001):
        return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.6g}"


def _thinned(line: Line) -> Line:
    if len(line.x) <= MAX_POINTS:
        return line
    chosen = np.linspace(0, len(line.x) - 1, MAX_POINTS).round().astype(int)
    return Line(line.name, line.style, *([values[i] for i in chosen] for values in line[2:4]))
