"""Clocks. Only this file reads wall time; all other code takes a Clock as an argument, so that the
same coordinator runs on real meshes, in tests, and in simulated time."""

import datetime
import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since an arbitrary zero, and a way to wait."""

    def now(self) -> float:
        """Return the time in seconds; it never decreases."""
        ...

    def idle(self, turns: int = 1) -> None:
        """Wait. The coordinator calls this after a turn that changed nothing, the `turns`-th in a
        row."""
        ...


class WallClock:
    """Monotonic wall time; zero is when the clock was made.

    `idle` sleeps `shortest` seconds in each of the first `patience` + 1 idle turns in a row, so
    that the coordinator sees a finished step within 0.1 ms (Linux sleeps at least 0.05 ms longer
    than asked). Each further sleep is twice as long as the last, up to `longest`, so that a long
    step does not keep a core busy. Set `patience` to 0 where the devices are the host's own cores:
    a loop that polls often takes a core from the steps that it waits for.
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
    """Simulated time, which moves by `advance` and `advance_to`, and by `tick` seconds with each
    `idle`."""

    def __init__(self, tick: float = 1.0) -> None:
        self._now = 0.0
        self._tick = tick

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` >= 0."""
        if seconds < 0:
            raise ValueError(f"seconds={seconds}: time does not run backwards")
        self._now += seconds

    def advance_to(self, moment: float) -> None:
        """Jump to `moment`, exactly; a moment that has passed changes nothing."""
        self._now = max(self._now, moment)

    def idle(self, turns: int = 1) -> None:
        del turns
        self._now += self._tick


def strftime_now(form: str) -> str:
    """Format the local date and time as `datetime.strftime` does; some chat templates print it."""
    return datetime.datetime.now().strftime(form)


def unix_time() -> int:
    """Whole seconds since 1970, for clients that expect a date."""
    return int(time.time())


def unix_ns() -> int:
    """Nanoseconds since 1970, for traces that other hosts are part of."""
    return time.time_ns()


def utc_now() -> str:
    """Date and time, UTC, as 20261130-184500; for the names and heads of results."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
