"""Where the host's time goes in a serving loop: the parts of a coordinator's turns, by the clock
that the coordinator itself was given."""

from collections import defaultdict

from pdjax import LLM
from pdjax.host.metrics.observer import Observer, TurnPart

PARTS: list[TurnPart] = [part for part in TurnPart if part is not TurnPart.WAIT]

NEWS, POLLS, IDLE = "news", "polls", "idle"
LABELS = (*(part.value for part in PARTS), NEWS, POLLS, IDLE)
"""Keys of `StepTimes.seconds`: the parts of turns that changed something; "news", the rest of such
turns, which has the front end's work; "polls", turns that found nothing to do, without their wait;
"idle", the waits."""


class StepTimes(Observer):
    """Adds up the parts of every turn that its own `step` drives. Costs about a microsecond a part.

    Args:
      llm: is observed from now on.
    """

    def __init__(self, llm: LLM) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._llm, self._now = llm, llm.clock.now
        self._turn: defaultdict[TurnPart, float] = defaultdict(float)
        self._part: TurnPart | None = None
        self._since, self._busy = 0.0, False
        llm.coordinator.observer = self

    def step(self) -> None:
        """Call `llm.step()`, and time its parts."""
        self._turn.clear()
        start = self._now()
        try:
            self._llm.step()
        finally:
            self._close(self._now() - start)

    def per_step(self, steps: int) -> dict[str, float]:
        """Return the microseconds a decode step, by label."""
        return {label: self.seconds[label] / steps * 1e6 for label in LABELS}

    def part_began(self, part: TurnPart) -> None:
        self._end_part()
        self._part = part

    def turn_ended(self, busy: bool) -> None:
        self._end_part()
        self._part, self._busy = None, busy

    def _end_part(self) -> None:
        now = self._now()
        if self._part is not None:
            self._turn[self._part] += now - self._since
        self._since = now

    def _close(self, whole: float) -> None:
        """Add a turn that took `whole` seconds."""
        waited = self._turn.pop(TurnPart.WAIT, 0.0)
        self.seconds[IDLE] += waited
        if self._busy:
            self.seconds[NEWS] += whole - waited - sum(self._turn.values())
            for part, seconds in self._turn.items():
                self.seconds[part.value] += seconds
        else:
            self.seconds[POLLS] += whole - waited
