"""The threads that wait for news of a session, and how they are woken."""

from collections.abc import Iterator
from contextlib import contextmanager

from pdjax.entry import Listener


class Listeners:
    """Those that wait at this moment."""

    def __init__(self) -> None:
        self._waiting = set[Listener]()

    @contextmanager
    def waiting(self, listener: Listener) -> Iterator[None]:
        """While a thread waits, it may have to drive; when it ends, another one has to."""
        self._waiting.add(listener)
        try:
            yield
        finally:
            self._waiting.discard(listener)
            self.wake_one()

    def wake_one(self) -> None:
        """Let a thread that sleeps look whether it has to drive. When it leaves, it wakes the
        next."""
        for listener in list(self._waiting)[:1]:
            listener.event.set()

    def wake_all(self) -> None:
        """Let every thread look."""
        for listener in list(self._waiting):
            listener.event.set()

    def turn_ended(self) -> None:
        """Wake those that want turns."""
        for listener in list(self._waiting):
            if listener.wants_turns:
                listener.event.set()
