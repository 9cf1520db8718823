"""Events by polling: for devices, which do not tell when their work has ended, and for fakes."""

from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Seq
from heapq import heappop, heappush
from itertools import count
from typing import Any

from pdjax.core.clock import Clock
from pdjax.interfaces.events import Event
from pdjax.interfaces.tickets import Ticket

_LONGEST_WAIT_S = 0.05
"""Seconds after which `wait` returns even if nothing has happened."""


def is_ready(ticket: Ticket[Any]) -> bool:
    """Whether there is something to read; the error of work that has failed is, too."""
    try:
        return ticket.ready()
    except Exception:
        return True


class PolledEvents:
    """Looks at the oldest ticket of each queue; see `interfaces.events.EventSource`.

    Args:
      clock: tells the time, and naps between two looks.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queues: dict[Hashable, deque[tuple[Ticket[Any], Event]]] = {}
        self._timers: list[tuple[float, int, Event]] = []
        self._numbers = count()
        self._posted: deque[Event] = deque()
        self._seen: deque[Event] = deque()
        self._woken = False

    def watch(self, ticket: Ticket[Any], event: Event, queue: Hashable = None) -> None:
        name = next(self._numbers) if queue is None else queue
        self._queues.setdefault(name, deque()).append((ticket, event))

    def at(self, moment: float, event: Event) -> None:
        heappush(self._timers, (moment, next(self._numbers), event))

    def post(self, event: Event) -> None:
        self._posted.append(event)

    def wake(self) -> None:
        # No lock: a signal handler or a finaliser may call this in the middle of any other call.
        self._woken = True

    def poll(self) -> Seq[Event]:
        while self._posted:
            self._seen.append(self._posted.popleft())
        self._seen.extend(self._look())
        events, self._seen = list(self._seen), deque()
        return events

    def wait(self) -> None:
        until, naps = self._clock.now() + _LONGEST_WAIT_S, 0
        while not (self._woken or self._posted or self._seen) and self._clock.now() < until:
            naps += 1
            self._clock.idle(naps)
            self._seen.extend(self._look())
        self._woken = False

    def forget(self) -> None:
        self._queues.clear()
        self._timers.clear()
        self._seen.clear()

    def _look(self) -> Iterator[Event]:
        while self._timers and self._timers[0][0] <= self._clock.now():
            yield heappop(self._timers)[2]
        for name, queue in list(self._queues.items()):
            while queue and is_ready(queue[0][0]):
                yield queue.popleft()[1]
            if not queue:
                del self._queues[name]
