"""Work in flight whose end is known from its start."""

from typing import Generic, TypeVar

from pdjax.core.clock import VirtualClock

ResultT = TypeVar("ResultT")


class SimTicket(Generic[ResultT]):
    """Work that comes back at a moment of a virtual clock.

    Attributes:
      moment: when it comes back, seconds on the clock.
    """

    __slots__ = ("_clock", "_error", "_result", "moment")

    def __init__(self, clock: VirtualClock, moment: float, result: ResultT) -> None:
        self._clock, self.moment, self._result = clock, moment, result
        self._error: Exception | None = None

    def ready(self) -> bool:
        return self._clock.now() >= self.moment

    def result(self) -> ResultT:
        """The outcome. On a virtual clock a wait is a jump: the clock moves on to the moment."""
        self._clock.advance_to(self.moment)
        if self._error is not None:
            raise self._error
        return self._result

    def fail(self, error: Exception) -> None:
        """Let the work end in an error, at its moment, unless it has come back already."""
        if not self.ready():
            self._error = error
