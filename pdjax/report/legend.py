"""The legend below a chart."""

from collections.abc import Callable, Sequence

from pdjax.report.svg import Picture

ROW = 20.0
"""Height of a row."""
LETTER = 7.2
"""Width of a letter, about."""
_SWATCH = 24.0
"""Room of the sample before a name."""


class Legend:
    """Names beside samples, in as few rows as hold them.

    Args:
      names: of the series, in order.
      left, right: ends of the room.
    """

    def __init__(self, names: Sequence[str], left: float, right: float) -> None:
        self._rows: list[list[tuple[float, int, str]]] = [[]]
        begin = left
        for number, name in enumerate(names):
            width = _SWATCH + 12 + len(name) * LETTER
            if self._rows[-1] and begin + width > right:
                self._rows.append([])
                begin = left
            self._rows[-1].append((begin, number, name))
            begin += width

    @property
    def height(self) -> float:
        """Of all rows."""
        return len(self._rows) * ROW

    def draw(
        self, picture: Picture, top: float, sample: Callable[[float, float, int], None]
    ) -> None:
        """Draw it; `sample(left, middle, number)` draws that of a series."""
        for row, entries in enumerate(self._rows):
            middle = top + (row + 0.5) * ROW - 4
            for left, number, name in entries:
                sample(left, middle, number)
                picture.text(left + _SWATCH, middle + 4, name, "start")
