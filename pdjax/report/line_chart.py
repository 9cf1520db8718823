"""Lines over one axis: attainment over rate, latencies over time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from pdjax.report.legend import Legend
from pdjax.report.numbers import round_powers, round_steps, shown
from pdjax.report.svg import Picture, color

WIDTH, HEIGHT = 760.0, 360.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 20.0, 14.0, 52.0


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    Attributes:
      name: what it measures, with its unit.
      log: logarithmic, for values above 0.
      least, most: that it covers in any case; None goes by the values.
    """

    name: str
    log: bool = False
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
      name: of the legend.
      xs: places on the x axis, in order.
      ys: a value for each; None or what is not finite leaves a gap in the line.
      dashed: drawn in dashes, as of a variant of another line.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    dashed: bool = False

    def __post_init__(self) -> None:
        if len(self.xs) != len(self.ys):
            raise ValueError(
                f"series {self.name!r}: has {len(self.xs)} xs and {len(self.ys)} ys; must be equal"
            )


@dataclass(frozen=True)
class LineChart:
    """A chart of lines.

    Attributes:
      title: what it shows, for a caption and for a reader that sees nothing.
      x, y: its axes.
      series: one line each, at least one.
      levels: (y, name) of horizontal lines, as of a target.

    Raises:
      ValueError: no series, or a value that a logarithmic axis cannot show.
    """

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    levels: Sequence[tuple[float, str]] = ()

    def __post_init__(self) -> None:
        if not self.series:
            raise ValueError(f"chart {self.title!r}: needs at least one series")
        for axis, values in ((self.x, self._xs), (self.y, self._ys)):
            if axis.log and any(value <= 0 for value in values):
                raise ValueError(
                    f"chart {self.title!r}: axis {axis.name!r} is logarithmic; values must be "
                    f"above 0, but one is {min(values)}"
                )

    @property
    def _xs(self) -> list[float]:
        return [x for each in self.series for x in each.xs]

    @property
    def _ys(self) -> list[float]:
        drawn = [y for each in self.series for y in each.ys if y is not None and math.isfinite(y)]
        return drawn + [level for level, _ in self.levels]

    def draw(self) -> str:
        """The chart as SVG."""
        names = [each.name for each in self.series]
        legend, bottom = Legend(names, _LEFT, WIDTH - _RIGHT), HEIGHT - _BOTTOM
        description = f"{self.y.name} over {self.x.name}, a line each of: {', '.join(names)}"
        picture = Picture(WIDTH, HEIGHT + legend.height, self.title, description)
        across = _Scale(self.x, self._xs, _LEFT, WIDTH - _RIGHT)
        up = _Scale(self.y, self._ys, bottom, _TOP)
        self._frame(picture, across, up)
        for level, name in self.levels:
            picture.line(_LEFT, up.at(level), WIDTH - _RIGHT, up.at(level), "level")
            picture.text(WIDTH - _RIGHT - 4, up.at(level) - 5, name, "end faint")
        for number, each in enumerate(self.series):
            self._line(picture, number, each, across, up)
        legend.draw(picture, HEIGHT, partial(_sample, picture))
        return picture.write()

    def _frame(self, picture: Picture, across: "_Scale", up: "_Scale") -> None:
        bottom = HEIGHT - _BOTTOM
        for mark in up.marks:
            picture.line(_LEFT, up.at(mark), WIDTH - _RIGHT, up.at(mark), "grid")
            picture.text(_LEFT - 8, up.at(mark) + 4, shown(mark), "end")
        for mark in across.marks:
            picture.line(across.at(mark), bottom, across.at(mark), bottom + 5, "axis")
            picture.text(across.at(mark), bottom + 19, shown(mark), "middle")
        picture.line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "axis")
        picture.text((_LEFT + WIDTH - _RIGHT) / 2, bottom + 40, self.x.name, "middle")
        picture.text(16, (_TOP + bottom) / 2, self.y.name, "middle", turned=True)

    def _line(
        self, picture: Picture, number: int, each: Series, across: "_Scale", up: "_Scale"
    ) -> None:
        look = f"line {color(number)}" + (" dashed" if each.dashed else "")
        run = list[tuple[float, float]]()
        places = list[tuple[float, float, str]]()
        for x, y in zip(each.xs, each.ys, strict=True):
            if y is None or not math.isfinite(y):
                _draw_run(picture, run, look)
                run = []
                continue
            run.append((across.at(x), up.at(y)))
            places.append((*run[-1], f"{each.name}: {shown(float(y))} at {shown(float(x))}"))
        _draw_run(picture, run, look)
        for left, top, hint in places:
            picture.marker(left, top, number, hint)


def _sample(picture: Picture, left: float, middle: float, number: int) -> None:
    picture.line(left, middle, left + 18, middle, f"line {color(number)}")
    picture.marker(left + 9, middle, number)


def _draw_run(picture: Picture, run: list[tuple[float, float]], look: str) -> None:
    if len(run) > 1:
        picture.path(run, look)


class _Scale:
    """Places of values along an axis that goes from `start` to `end` of the picture."""

    def __init__(self, axis: Axis, values: list[float], start: float, end: float) -> None:
        known = [*values, *(each for each in (axis.least, axis.most) if each is not None)]
        low, high = min(known, default=0.0), max(known, default=1.0)
        if not axis.log and axis.least is None and 0 <= low <= 0.5 * high:
            low = 0.0  # lengths are compared from 0 on
        self.log, self.start, self.end = axis.log, start, end
        if axis.log:
            low, high = (low, high) if values else (1.0, 10.0)
        self.marks = round_powers(low, high) if axis.log else round_steps(low, high)
        if axis.most is not None:
            self.marks = [mark for mark in self.marks if mark <= axis.most * (1 + 1e-9)]
        self.low, self.high = self._of(self.marks[0]), self._of(self.marks[-1])

    def at(self, value: float) -> float:
        """The place of a value."""
        share = (self._of(value) - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value
