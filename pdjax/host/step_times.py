"""How long an engine's steps take: a line over their size, fitted to those that have come back."""

from math import inf

_KEPT = 1 - 1 / 128
"""What a measurement still counts after the next one: so about the last 128 steps count."""
_SAME = 1e-9
"""Share of the sizes' squares below which sizes do not differ, but for rounding."""


class StepTimes:
    """Seconds of steps by their size, as `base + each * size`: least squares over exponentially
    weighted sums, so that it follows an engine that becomes slower, and costs the same few sums
    whatever has been measured.

    Neither part is ever below 0. While all steps have had one size, they are taken to cost the same
    whatever the size: so a size that has not been tried is not ruled out by a guess.
    """

    __slots__ = ("_line", "_n", "_x", "_xx", "_xy", "_y")

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._line: tuple[float, float] | None = None  # base, each; None: to be worked out

    @property
    def measured(self) -> bool:
        """Whether any step has come back."""
        return self._n > 0

    @property
    def count(self) -> float:
        """Steps that count, the older the less."""
        return self._n

    @property
    def mean_size(self) -> float:
        """Of those steps; 0 where there is none."""
        return self._x / self._n if self._n else 0.0

    def add(self, size: int, seconds: float) -> None:
        """Note a step of a size (tokens, or rows) that took so many seconds."""
        self._n = self._n * _KEPT + 1.0
        self._x = self._x * _KEPT + size
        self._y = self._y * _KEPT + seconds
        self._xx = self._xx * _KEPT + size * size
        self._xy = self._xy * _KEPT + size * seconds
        self._line = None

    def line(self) -> tuple[float, float]:
        """`base` and `each`, seconds; both 0 where nothing has been measured."""
        if self._line is None:
            self._line = self._fit()
        return self._line

    def seconds(self, size: int) -> float | None:
        """Of a step of that size; None where nothing has been measured."""
        if not self._n:
            return None
        base, each = self.line()
        return base + each * size

    @property
    def each(self) -> float:
        """Seconds for each token (or row) of the steps that have come back, with its share of what
        a step takes by itself; 0 where nothing has been measured."""
        return self._y / self._x if self._x else 0.0

    def within(self, seconds: float) -> float:
        """The largest size of which a step is predicted to take at most so many seconds: infinity
        where size costs nothing, 0 where no step is so short. Where all steps have had one size,
        seconds are in proportion to it: the next one tells."""
        if not self._n or self._y <= 0:
            return inf if seconds >= 0 else 0.0
        base, each = self.line()
        if each > 0:
            return max(0.0, (seconds - base) / each)
        return max(0.0, seconds * self._x / self._y)

    def knows(self, size: int) -> bool:
        """Whether a step of that size may be predicted from above and below. Steps of one size say
        nothing of smaller ones, which may take less."""
        return self._n > 0 and (self.line()[1] > 0 or size * self._n >= (1 - _SAME) * self._x)

    def _fit(self) -> tuple[float, float]:
        if not self._n:
            return 0.0, 0.0
        n, x, y, xx, xy = self._n, self._x, self._y, self._xx, self._xy
        spread = n * xx - x * x
        if spread <= _SAME * n * xx:
            return y / n, 0.0
        each = (n * xy - x * y) / spread
        base = (y - each * x) / n
        if each < 0:
            return y / n, 0.0
        if base < 0:
            return 0.0, xy / xx
        return base, each


def prefill_seconds(times: StepTimes, budget: int, tokens: int) -> float | None:
    """Seconds in which an engine computes so many prompt tokens, in steps of its whole token budget
    and one of the rest; None where no step has been measured."""
    if not times.measured:
        return None
    base, each = times.line()
    return -(-tokens // budget) * base + each * tokens
