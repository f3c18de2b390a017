"""recipes/scoring/charts.py."""

import re
from xml.etree import ElementTree

import pytest

from recipes.scoring.charts import HEIGHT, WIDTH, Line, distribution, line_chart, ticks


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([0.91, 0.98], [0.9, 0.92, 0.94, 0.96, 0.98]),
        ([-3.0, 140.0], [-50, 0, 50, 100, 150]),
        ([2.0, 2.0], [1, 1.5, 2, 2.5, 3]),
    ],
)
def test_ticks_are_round_and_enclose(values: list[float], expected: list[float]) -> None:
    assert ticks(values) == pytest.approx(expected)


def test_distribution_is_a_step_line() -> None:
    x, y = distribution([3.0, 1.0, 1.0, 2.0])
    assert x == [1, 1, 1, 1, 2, 2, 3, 3]
    assert y == pytest.approx([0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1])
    x, y = distribution([float(value) for value in range(10_000)])
    assert len(x) <= 400
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 9999, 1)


def test_chart_is_well_formed_and_places_points() -> None:
    line = Line("a <b> & c", 9, [0.0, 10.0], [0.0, 1.0], [0.0, 0.8], [0.2, None])
    chart = line_chart([line], "t <i>", "x", "y", markers=True)
    root = ElementTree.fromstring(chart)
    assert root.get("aria-label") == "t <i>"
    (path,) = (one for one in root.iter("path") if "line" in one.get("class", ""))
    assert path.get("class") == "line s1 dashed"
    assert path[0].text == "a <b> & c"
    (x, y), (right, top) = re.findall(r"([\d.]+) ([\d.]+)", path.get("d", ""))
    assert (float(x), float(right)) == (52, WIDTH - 10)
    assert (float(y), float(top)) == (HEIGHT - 40, 8)
    bars = [one for one in root.iter("path") if "bar" in one.get("class", "")]
    assert len(bars) == 1  # One interval has no upper end.
    assert len([*root.iter("circle")]) == 2
