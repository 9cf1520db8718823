"""Places in charts, and the numbers that they are marked with."""

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from pdjax.report.bar_chart import BarChart
from pdjax.report.line_chart import Axis, LineChart, Series
from pdjax.report.numbers import round_powers, round_steps, shown
from pdjax.report.standalone import standalone_svg


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),  # noqa: RUF001
        (float("nan"), "–"),  # noqa: RUF001
        (float("inf"), "–"),  # noqa: RUF001
        (True, "yes"),
        (12345, "12,345"),
        (0.0, "0"),
        (4.0, "4"),
        (123.456, "123.5"),
        (99999.0, "99,999"),
        (0.01234567, "0.01235"),
        (-0.5, "-0.5"),
        (3e11, "3.000e+11"),
        ("4 x", "4 x"),
    ],
)
def test_a_value_is_written_for_a_reader(value: object, text: str):
    assert shown(value) == text


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0, 0), (5, 5), (-3, -3), (0.013, 0.94), (-7, 12), (1e-6, 3e-6), (100, 101), (0, 7e9)],
)
def test_round_steps_cover_the_values_evenly(low: float, high: float):
    marks = round_steps(low, high)
    assert 2 <= len(marks) <= 8
    assert marks[0] <= low + 1e-9 * abs(low) and marks[-1] >= high - 1e-9 * abs(high)
    gaps = {round((b - a) / (marks[1] - marks[0]), 6) for a, b in pairwise(marks)}
    assert gaps == {1.0}


def test_round_steps_are_those_that_a_reader_expects():
    assert round_steps(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert round_steps(0, 24) == [0, 5, 10, 15, 20, 25]


@pytest.mark.parametrize(("low", "high"), [(1, 100), (0.3, 0.9), (2, 2), (1, 1e6), (128, 512)])
def test_round_powers_cover_the_values(low: float, high: float):
    marks = round_powers(low, high)
    assert marks[0] <= low * (1 + 1e-9) and marks[-1] >= high * (1 - 1e-9)
    assert marks == sorted(set(marks)) and len(marks) <= 8


def points(chart: LineChart) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(chart.draw())
    lines = [each.get("points", "") for each in root.iter("polyline")]
    return [
        [tuple(map(float, point.split(","))) for point in line.split()]  # type: ignore[misc]
        for line in lines
    ]


def test_a_line_goes_through_its_values():
    axis = Axis("x", least=0, most=10), Axis("y", least=0, most=1)
    [line] = points(LineChart("c", *axis, [Series("s", [0, 5, 10], [0, 0.5, 1])]))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1) and y0 - y1 == pytest.approx(y1 - y2)
    assert x2 > x0 and y2 < y0, "up is up"


def test_a_gap_in_the_values_is_a_gap_in_the_line():
    values = [1.0, 2.0, None, 3.0, 4.0, float("nan"), 5.0]
    chart = LineChart("c", Axis("x"), Axis("y"), [Series("s", list(range(7)), values)])
    assert [len(line) for line in points(chart)] == [2, 2]
    assert chart.draw().count("<circle") == 5 + 1, "each value, and the legend"


def test_a_logarithmic_axis_has_equal_ways_for_equal_ratios():
    series = [Series("s", [1, 10, 100], [1, 1, 1])]
    [line] = points(LineChart("c", Axis("x", log=True), Axis("y"), series))
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0], abs=0.2)


def test_a_bar_is_as_long_as_its_parts():
    chart = BarChart("c", "ms", [("a", {"x": 2.0, "y": 6.0}), ("b", {"y": 8.0})])
    root = ElementTree.fromstring(chart.draw())
    widths = [float(each.get("width", "")) for each in root.iter("rect")]
    assert widths[0] + widths[1] == pytest.approx(widths[2], abs=0.2)
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.3)
    hints = [each.text for each in root.iter("title")]
    assert "a, y: 6 ms" in hints


def test_many_series_have_a_legend_of_several_rows():
    series = [Series(f"a long name of a series, {i}", [0, 1], [i, i]) for i in range(12)]
    root = ElementTree.fromstring(LineChart("c", Axis("x"), Axis("y"), series).draw())
    names = {each.text for each in root.iter("text")}
    assert {each.name for each in series} <= names
    width, height = map(float, root.get("viewBox", "").split()[2:])
    assert all(0 <= float(t.get("x", "0")) <= width for t in root.iter("text"))
    assert all(0 <= float(t.get("y", "0")) <= height for t in root.iter("text"))


def test_a_chart_stands_alone_as_a_file():
    chart = LineChart("a < b", Axis("x"), Axis("y"), [Series("s", [1, 2], [3, 4])])
    root = ElementTree.fromstring(standalone_svg(chart))
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg" and root.findtext(f"{svg}title") == "a < b"
    assert root.find(f"{svg}style") is not None and len(root.findall(f".//{svg}polyline")) == 1
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    inner = ElementTree.fromstring(chart.draw()).attrib["viewBox"].split()[2:]
    assert width == float(inner[0]) and height > float(inner[1])
