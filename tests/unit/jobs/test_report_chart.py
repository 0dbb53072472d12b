import math
import re

import pytest

from jobs.reporting.chart import HEIGHT, MAX_POINTS, WIDTH, Series, line_chart, short, split_bar


def _points(chart: str) -> list[tuple[float, float]]:
    path = re.search(r'<polyline[^>]*points="([^"]+)"', chart)
    assert path is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in path.group(1).split())]


def _ticks(chart: str) -> list[float]:
    left = re.findall(r'class="tick end" x="44" y="[\d.]+">([^<]+)<', chart)
    return [float(text.replace(",", "")) for text in left]


def test_higher_values_are_drawn_higher_and_inside_the_picture():
    chart = line_chart("loss", "", [1, 2, 3], [Series("a", [4.0, 1.0, 2.0], 1)])
    points = _points(chart)
    assert points[0][1] < points[2][1] < points[1][1]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)


def test_values_that_are_not_finite_are_left_out():
    chart = line_chart("loss", "", [1, 2, 3], [Series("a", [4.0, math.nan, math.inf], 1)])
    assert "nan" not in chart
    assert "inf" not in chart
    assert "<circle" in chart  # one point is left


def test_chart_without_a_value_is_not_drawn():
    assert line_chart("loss", "", [1, 2], [Series("a", [math.nan, math.nan], 1)]) == ""
    assert line_chart("loss", "", [], [Series("a", [], 1)]) == ""


def test_long_runs_are_merged_into_means_with_their_range():
    steps = list(range(10_000))
    chart = line_chart("loss", "", steps, [Series("a", [1.0 + step % 2 for step in steps], 1)])
    assert len(_points(chart)) <= MAX_POINTS
    assert len({y for _x, y in _points(chart)}) == 1
    assert 'class="band' in chart


def test_spans_of_several_decades_get_a_logarithmic_axis():
    values = [1000.0, 10.0, 0.1]
    assert "logarithmic" in line_chart("loss", "", [1, 2, 3], [Series("a", values, 1)])
    assert "logarithmic" not in line_chart("a", "", [1, 2, 3], [Series("a", [3.0, 2.0, 1.0], 1)])
    falling = [y for _x, y in _points(line_chart("l", "", [1, 2, 3], [Series("a", values, 1)]))]
    assert falling[1] - falling[0] == pytest.approx(falling[2] - falling[1], abs=0.2)


def test_axis_starts_at_zero_when_asked():
    series = [Series("a", [300.0, 310.0], 1)]
    assert 0 not in _ticks(line_chart("rate", "", [1, 2], series))
    assert 0 in _ticks(line_chart("rate", "", [1, 2], series, from_zero=True))


@pytest.mark.parametrize("values", [[2.0, 2.0], [0.0, 0.0], [-1.0, -1.0], [1e-9, 2e-9], [1e9, 1e9]])
def test_flat_tiny_and_huge_values_have_an_axis(values: list[float]):
    assert 2 <= len(_ticks(line_chart("a", "", [1, 2], [Series("a", values, 1)]))) <= 8


def test_words_are_escaped():
    chart = line_chart("<b>", "&", [1, 2], [Series("<i>", [1.0, 2.0], 1), Series("b", [1, 2], 2)])
    assert "<b>" not in chart.replace("<b>&lt;b&gt;</b>", "")
    assert "<i>" not in chart


def test_shares_of_a_bar_fill_it():
    bar = split_bar("time", "", [("a", 3.0, "3 s", 1), ("b", 1.0, "1 s", 2)])
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bar)]
    assert widths == [75.0, 25.0]
    assert split_bar("time", "", [("a", 0.0, "", 1)]) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (1234, "1,234"), (1e-5, "1e-5"), (2.5e6, "2.5e6"), (-0.25, "-0.25")],
)
def test_numbers_are_short(value: float, text: str):
    assert short(value) == text
