"""What a section of a report is made of."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pdjax.report.numbers import shown


class Chart(Protocol):
    """What can be drawn: `LineChart`, `BarChart`."""

    @property
    def title(self) -> str:
        """What it shows."""

    def draw(self) -> str:
        """The chart as SVG, of which every text is escaped."""


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    sentences: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      caption: what it is of.
      heads: names of the columns; the first column names the rows.
      rows: cells, which `numbers.shown` writes.
      best: (row, column) of cells that stand out, counted from 0.

    Raises:
      ValueError: a row with another number of cells than there are columns.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    best: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.heads):
                raise ValueError(
                    f"table {self.caption!r}: a row has {len(row)} cells; must have "
                    f"{len(self.heads)}, as there are heads"
                )

    @property
    def cells(self) -> list[list[tuple[str, str]]]:
        """The cells of each row: (text, classes)."""
        return [
            [
                (
                    shown(cell),
                    " ".join(
                        name
                        for name, holds in (
                            ("number", column > 0 and not isinstance(cell, str)),
                            ("best", (number, column) in self.best),
                        )
                        if holds
                    ),
                )
                for column, cell in enumerate(row)
            ]
            for number, row in enumerate(self.rows)
        ]


@dataclass(frozen=True)
class Facts:
    """Names and values, as of a machine or of versions."""

    caption: str
    values: Mapping[str, Any]

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Name and text of each."""
        return [(name, shown(value)) for name, value in self.values.items()]


@dataclass(frozen=True)
class Figure:
    """A chart with a caption.

    Attributes:
      chart: `LineChart` or `BarChart`.
      caption: how to read it; "" is the chart's title alone.
    """

    chart: Chart
    caption: str = ""


@dataclass(frozen=True)
class Drawing:
    """A picture that matplotlib has drawn, kept inside the page; see `pdjax/pictures`.

    Attributes:
      svg: it, as bytes of an SVG file.
      title: what it shows.
      caption: how to read it.
    """

    svg: bytes
    title: str
    caption: str = ""

    @classmethod
    def of(cls, figure: Any, title: str, caption: str = "") -> "Drawing":
        """Of a matplotlib Figure."""
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
        return cls(written.getvalue(), title, caption)

    @property
    def source(self) -> str:
        """The picture as an address that holds all of it."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode('ascii')}"


Block = Words | Points | Table | Facts | Figure | Drawing
