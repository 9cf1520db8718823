"""When hand-offs are overdue."""

from pdjax.config import HandoffConfig
from pdjax.host.handoff.handoff import Handoff
from pdjax.host.runtime import Runtime
from pdjax.interfaces.events import TimerDue

EXPIRE = TimerDue("hand-offs")
"""Tells that a hand-off may be overdue."""

NEVER = float("inf")


class Deadlines:
    """Sets one timer, for the hand-off that may be overdue first.

    Args:
      config: the lease of room whose prefill has not ended, and the deadline of an attempt.
      runtime: has the events and the clock.
    """

    def __init__(self, config: HandoffConfig, runtime: Runtime) -> None:
        self._lease, self._deadline = config.lease, config.deadline
        self._runtime = runtime
        self._timer = NEVER

    def opened(self, handoff: Handoff) -> None:
        """Room has been reserved."""
        if self._lease is not None:
            self._expect(handoff.opened + self._lease)

    def sent(self) -> None:
        """Something has left, or could leave from now on."""
        if self._deadline is not None:
            self._expect(self._runtime.clock.now() + self._deadline)

    def overdue(self, handoffs: list[Handoff]) -> list[Handoff]:
        """The hand-offs that are overdue, now that the timer is due."""
        now, self._timer = self._runtime.clock.now(), NEVER
        overdue = []
        for handoff in handoffs:
            due = self._due(handoff)
            if due <= now:
                overdue.append(handoff)
            elif due < NEVER:
                self._expect(due)
        return overdue

    def _expect(self, moment: float) -> None:
        if moment < self._timer:
            self._timer = moment
            self._runtime.events.at(moment, EXPIRE)

    def _due(self, handoff: Handoff) -> float:
        """When a hand-off is overdue, as far as can be said now."""
        if handoff.departed is None:
            return NEVER if self._lease is None else handoff.opened + self._lease
        if self._deadline is None or not handoff.waits:
            return NEVER
        return max(handoff.departed, handoff.left) + self._deadline
