"""Charts and tables of the points of a study."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.common.tables import number, table
from pdjax.report.blocks import Table
from pdjax.report.line_chart import Axis, LineChart, Series

LATENCIES = {
    "TTFT p50, ms": "median_ttft_ms",
    "TTFT p90, ms": "p90_ttft_ms",
    "TPOT p50, ms": "median_tpot_ms",
    "TPOT p90, ms": "p90_tpot_ms",
    "ITL p99, ms": "p99_itl_ms",
}
"""Columns of tables, and their keys."""


def lines_over(
    points: Iterable[Mapping[str, Any]],
    over: str,
    key: str,
    title: str,
    axes: tuple[Axis, Axis],
    *,
    by: str = "mode",
    scale: float = 1.0,
    levels: Sequence[tuple[float, str]] = (),
    more: Sequence[Series] = (),
) -> LineChart:
    """Draw a key of points over another one, a line for each value of `by`.

    Args:
      scale: multiplies the key, as 100 for percent.
      levels: horizontal lines.
      more: series beside those of points.
    """
    lines: dict[str, list[tuple[float, float | None]]] = {}
    for point in points:
        value = point[key]
        lines.setdefault(str(point[by]), []).append(
            (point[over], None if value is None else scale * value)
        )
    series = [
        Series(name, [x for x, _ in sorted(line)], [y for _, y in sorted(line)])
        for name, line in lines.items()
    ]
    return LineChart(title, *axes, [*series, *more], levels)


def point_table(
    caption: str, points: Iterable[Mapping[str, Any]], columns: Mapping[str, str]
) -> Table:
    """A row for each point; `columns`: heads, and the keys below them. Shares are in percent."""

    def cell(point: Mapping[str, Any], key: str) -> Any:
        value = point[key]
        return 100 * value if key.endswith("attainment") and value is not None else value

    rows = [[cell(point, key) for key in columns.values()] for point in points]
    return Table(caption, list(columns), rows)


def printed(made: Table) -> str:
    """A table for a terminal."""

    def cell(value: Any) -> str:
        return (
            number(value, 1) if isinstance(value, float) else "-" if value is None else str(value)
        )

    return table(made.heads, [[cell(value) for value in row] for row in made.rows])
