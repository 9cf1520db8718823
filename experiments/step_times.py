"""Measures the host's time in a serving loop: the parts of `Coordinator.step`, timed in place by
the coordinator's own clock."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from pdjax import LLM

PARTS = {
    "_harvest_decode": "harvest decode",
    "_land_transfers": "land",
    "_dispatch_decode": "dispatch decode",
    "_harvest_prefill": "harvest prefill",
    "_reserve_then_move": "admit",
    "_dispatch_prefill": "dispatch prefill",
}
"""Methods of the coordinator, in the order of a step, and their names in a report."""

NEWS, POLLS, IDLE = "news", "polls", "idle"
LABELS = (*PARTS.values(), NEWS, POLLS, IDLE)
"""Labels of `StepTimes.seconds`: the parts of turns that changed something, then the handling of
their news (with the front end's work), whole turns that found nothing to do, without their sleep,
and the sleeps."""


class StepTimes:
    """Adds up the times of the parts of every later `llm.step()`; takes about a microsecond a
    part."""

    def __init__(self, llm: LLM) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._turn: defaultdict[str, float] = defaultdict(float)
        self._now = llm.clock.now
        for name, label in PARTS.items():
            self._time(llm.coordinator, name, label)
        self._time(llm.clock, "idle", IDLE)
        step = llm.step

        def whole_step() -> None:
            self._turn.clear()
            start = self._now()
            try:
                step()
            finally:
                self._close(self._now() - start)

        replace_method(llm, "step", whole_step)

    def per_step(self, steps: int) -> dict[str, float]:
        """Return the microseconds a decode step, by label."""
        return {label: self.seconds[label] / steps * 1e6 for label in LABELS}

    def _time(self, target: Any, name: str, label: str) -> None:
        """Count the time of a method of `target` for `label`, without the time of other counted
        methods within it: decode runs between the layer groups of a prefill step."""
        inner = getattr(target, name)

        def timed(*args: Any) -> Any:
            start, before = self._now(), sum(self._turn.values())
            try:
                return inner(*args)
            finally:
                within = sum(self._turn.values()) - before
                self._turn[label] += self._now() - start - within

        replace_method(target, name, timed)

    def _close(self, whole: float) -> None:
        """Add up a turn that took `whole` seconds."""
        idle = self._turn.pop(IDLE, 0.0)
        if idle:
            self.seconds[IDLE] += idle
            self.seconds[POLLS] += whole - idle
        else:
            self.seconds[NEWS] += whole - sum(self._turn.values())
            for label, seconds in self._turn.items():
                self.seconds[label] += seconds


def replace_method(target: Any, name: str, function: Callable[..., Any]) -> None:
    """Replace a method of `target` alone, not of its class."""
    setattr(target, name, function)
