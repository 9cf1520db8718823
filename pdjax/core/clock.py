"""Time, as an argument. The only file that reads wall time; everything else is handed a Clock, so
that the same coordinator runs on real meshes, in tests, and in simulated time."""

import datetime
import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since an arbitrary zero, and what to do when there is nothing to do."""

    def now(self) -> float:
        """Seconds, never decreasing."""
        ...

    def idle(self, turns: int = 1) -> None:
        """Called by the coordinator after a step that changed nothing, the `turns`-th in a row."""
        ...


class WallClock:
    """Monotonic wall time from the moment it was made.

    Idling naps: `shortest` seconds for `patience` turns and one more in a row, so that what a
    device has finished is seen within 0.1 ms (Linux sleeps 0.05 ms or more longer than asked to);
    then each time twice as long as the last, up to `longest`, so that no core is burnt over a
    device that takes long. Where the devices are the host's own cores, have no patience: a loop
    that polls too eagerly takes a core from the steps it waits for.
    """

    def __init__(
        self, shortest: float = 20e-6, longest: float = 1e-3, patience: int = 1000
    ) -> None:
        self._zero = time.perf_counter()
        self._shortest, self._longest, self._patience = shortest, longest, patience

    def now(self) -> float:
        return time.perf_counter() - self._zero

    def idle(self, turns: int = 1) -> None:
        impatient = min(max(0, turns - 1 - self._patience), 30)
        time.sleep(min(self._shortest * 2.0**impatient, self._longest))


class VirtualClock:
    """Simulated time: it moves only when told to. Idling jumps by `tick` seconds, or to the next
    `wake_at`."""

    def __init__(self, tick: float = 1.0) -> None:
        self._now = 0.0
        self._tick = tick
        self._wakes: list[float] = []

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move on by `seconds` >= 0."""
        if seconds < 0:
            raise ValueError(f"seconds={seconds}: time does not run backwards")
        self._now += seconds

    def wake_at(self, moment: float) -> None:
        """Promise that something happens at `moment`: an idle clock will not jump past it."""
        self._wakes.append(moment)

    def idle(self, turns: int = 1) -> None:
        del turns
        self._wakes = [wake for wake in self._wakes if wake > self._now]
        self._now = min(self._wakes) if self._wakes else self._now + self._tick


def strftime_now(form: str) -> str:
    """The local date and time, in a format of `datetime`; some chat templates print it."""
    return datetime.datetime.now().strftime(form)
