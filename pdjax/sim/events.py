"""Events on a virtual clock: what happens next is known, so that waiting is a jump."""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

from pdjax.core.clock import VirtualClock
from pdjax.interfaces.events import Event
from pdjax.interfaces.tickets import Ticket


class NothingToCome(RuntimeError):
    """A wait on a virtual clock would never end."""


class ScheduledEvents:
    """An `interfaces.events.EventSource` over tickets that know their moment.

    Events are told in the order of their moments, and those of the same moment in the order in
    which they were asked for. So the same run tells the same events, every time.

    Args:
      clock: is moved on by `wait`.

    Attributes:
      told: events told so far.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._scheduled: list[tuple[float, int, Event]] = []  # a heap
        self._alarms: list[float] = []  # a heap
        self._order = itertools.count()
        self._posted: deque[Event] = deque()
        self._woken = False
        self.told = 0

    def watch(self, ticket: Ticket[Any], event: Event, queue: Hashable = None) -> None:
        """Tell `event` at the ticket's moment.

        Raises:
          ValueError: the ticket does not know when it will be ready.
        """
        moment = getattr(ticket, "moment", None)
        if moment is None:
            raise ValueError(
                f"ticket={ticket!r}: does not know its moment; on a virtual clock only tickets of "
                "simulated engines and links can be watched"
            )
        self.at(moment, event)

    def at(self, moment: float, event: Event) -> None:
        heapq.heappush(self._scheduled, (moment, next(self._order), event))

    def wake_at(self, moment: float) -> None:
        """End a `wait` at `moment`, seconds on the clock, without an event, as for a request that
        arrives from outside. `forget` does not forget it."""
        heapq.heappush(self._alarms, moment)

    def post(self, event: Event) -> None:
        self._posted.append(event)

    def wake(self) -> None:
        self._woken = True

    def poll(self) -> Sequence[Event]:
        now, scheduled = self._clock.now(), self._scheduled
        events: list[Event] = []
        while self._posted:
            events.append(self._posted.popleft())
        while scheduled and scheduled[0][0] <= now:
            events.append(heapq.heappop(scheduled)[2])
        self.told += len(events)
        return events

    def wait(self) -> None:
        """Jump to the next moment at which something happens.

        Raises:
          NothingToCome: nothing is watched, asked for or posted.
        """
        woken, self._woken = self._woken, False
        if woken or self._posted:
            return
        alarm = self._alarms[0] if self._alarms else math.inf
        moment = min(alarm, self._scheduled[0][0]) if self._scheduled else alarm
        if moment == math.inf:
            raise NothingToCome(
                f"wait at {self._clock.now()} s: no ticket is watched and no timer is set, so "
                "that nothing would ever happen"
            )
        self._clock.advance_to(moment)
        while self._alarms and self._alarms[0] <= self._clock.now():
            heapq.heappop(self._alarms)

    def forget(self) -> None:
        self._scheduled.clear()
