"""What the engines have to tell one front, sent once a turn."""

import threading
from collections import deque

from pdjax.core.outputs import RequestEvent
from pdjax.serving.processes.frames import Frames
from pdjax.serving.processes.messages import News, Piece, PromptScored, piece_of
from pdjax.stream import Unread

MOST_UNSENT = 1 << 20
"""Bytes that wait for a front to read them; then events wait, merged, instead."""


class Outbox:
    """Events for one front. The coordinator's thread adds them within its turns and never waits.

    A front that does not read costs what its answers hold: events of a choice are merged.

    Args:
      frames: lead to the front.
    """

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._new: deque[tuple[int, RequestEvent]] = deque()
        self._unread: dict[int, Unread] = {}
        self._flushing = threading.Lock()

    def add(self, number: int, event: RequestEvent) -> None:
        """Leave an event of an answer for `flush`."""
        self._new.append((number, event))

    def flush(self) -> None:
        """Send what has been added, if the front has read what was sent before."""
        if not (self._new or self._unread):
            return
        with self._flushing:
            if self._frames.unsent <= MOST_UNSENT:
                pieces = self._waiting()
                while self._new:
                    pieces.append(self._piece(*self._new.popleft()))
                if pieces:
                    self._frames.send(News(pieces))
            while self._new:
                number, event = self._new.popleft()
                self._unread.setdefault(number, Unread()).append(event)

    def _waiting(self) -> list[Piece]:
        """What had to wait; nothing waits any more."""
        pieces = []
        for number, unread in self._unread.items():
            for event in unread.take_all():
                pieces.append(self._piece(number, event))
        self._unread.clear()
        return pieces

    def _piece(self, number: int, event: RequestEvent) -> Piece:
        if event.prompt_logprobs is not None:
            self._frames.send(PromptScored(number, event.prompt_logprobs))
        return piece_of(number, event)
