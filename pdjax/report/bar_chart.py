"""Bars that are made of parts: what a request's time goes on, how busy each engine is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pdjax.report.legend import LETTER, Legend
from pdjax.report.numbers import round_steps, shown
from pdjax.report.svg import Picture, color

WIDTH = 760.0
_RIGHT, _TOP, _BAR, _GAP, _FOOT = 70.0, 10.0, 22.0, 10.0, 50.0


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars, each a sum of parts.

    Attributes:
      title: what it shows, for a caption and for a reader that sees nothing.
      unit: of the values, as the axis names it.
      bars: (name, part -> value), at least one; parts have one colour in all bars.
      most: that the axis covers in any case; None goes by the longest bar.

    Raises:
      ValueError: no bar, or a value below 0.
    """

    title: str
    unit: str
    bars: Sequence[tuple[str, Mapping[str, float]]]
    most: float | None = None

    def __post_init__(self) -> None:
        if not self.bars:
            raise ValueError(f"chart {self.title!r}: needs at least one bar")
        for name, parts in self.bars:
            for part, value in parts.items():
                if not 0 <= value < float("inf"):
                    raise ValueError(
                        f"chart {self.title!r}: {part!r} of {name!r} is {value}; must be 0 or "
                        "more, and finite"
                    )

    @property
    def parts(self) -> list[str]:
        """The names of all parts, in the order in which bars have them."""
        return list(dict.fromkeys(part for _, parts in self.bars for part in parts))

    def draw(self) -> str:
        """The chart as SVG."""
        left = min(300.0, 20 + LETTER * max(len(name) for name, _ in self.bars))
        end = WIDTH - _RIGHT
        # Where all bars have the same one part, there is nothing to tell apart.
        legend = Legend(self.parts if len(self.parts) > 1 else (), left, end)
        bottom = _TOP + len(self.bars) * (_BAR + _GAP)
        height = bottom + _FOOT + legend.height
        description = f"{self.unit}, a bar each of: {', '.join(name for name, _ in self.bars)}"
        picture = Picture(WIDTH, height, self.title, description)
        longest = max(sum(parts.values()) for _, parts in self.bars)
        marks = round_steps(0.0, max(longest, self.most or 0.0))
        each = (end - left) / marks[-1]
        for mark in marks:
            picture.line(left + mark * each, _TOP, left + mark * each, bottom, "grid")
            picture.text(left + mark * each, bottom + 16, shown(float(mark)), "middle")
        picture.text((left + end) / 2, bottom + 36, self.unit, "middle")
        for row, (name, parts) in enumerate(self.bars):
            self._bar(picture, row, name, parts, left, each)
        legend.draw(picture, bottom + _FOOT, partial(_sample, picture))
        return picture.write()

    def _bar(
        self,
        picture: Picture,
        row: int,
        name: str,
        parts: Mapping[str, float],
        left: float,
        each: float,
    ) -> None:
        top = _TOP + row * (_BAR + _GAP) + _GAP / 2
        picture.text(left - 8, top + _BAR / 2 + 4, name, "end")
        begin = left
        for part in self.parts:
            value = parts.get(part, 0.0)
            if value > 0:
                hint = f"{name}, {part}: {shown(float(value))} {self.unit}"
                look = f"bar {color(self.parts.index(part))}"
                picture.box(begin, top, value * each, _BAR, look, hint)
                begin += value * each
        total = shown(float(sum(parts.values())))
        picture.text(begin + 6, top + _BAR / 2 + 4, total, "start")


def _sample(picture: Picture, left: float, middle: float, number: int) -> None:
    picture.box(left, middle - 6, 14, 12, f"bar {color(number)}", "")
