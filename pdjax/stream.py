"""An answer as it comes: what `LLM.stream` hands out."""

import threading
from collections import deque
from collections.abc import Callable

from pdjax.core.outputs import RequestEvent, merged
from pdjax.core.request import Request
from pdjax.entry import Entry
from pdjax.session import Session

StreamChunk = RequestEvent
"""What a stream hands out: what is new of one choice."""


_MERGED_AT = 64
"""Events of a choice that wait before they are merged into one."""


class Unread:
    """Events that nobody has taken yet. Of each choice up to 64 wait as they came; more are merged,
    so that a token that waits takes a few bytes and not an event. One thread uses it."""

    def __init__(self) -> None:
        # By choice; the one with the newest event is last, so that the last event stays the last.
        self._of_choice: dict[int, deque[RequestEvent]] = {}
        self._single: dict[int, int] = {}  # how many events at the end have not been merged

    def append(self, event: RequestEvent) -> None:
        """Keep one more event."""
        choice = event.choice
        waiting = self._of_choice.pop(choice, None) or deque()
        self._of_choice[choice] = waiting
        waiting.append(event)
        single = self._single[choice] = min(self._single.get(choice, 0) + 1, len(waiting))
        if single >= _MERGED_AT:
            parts = [waiting.pop() for _ in range(single)]
            waiting.append(merged(parts[::-1]))
            self._single[choice] = 0

    def popleft(self) -> RequestEvent:
        """Take an event of the choice whose newest event is the oldest.

        Raises:
          IndexError: there is none.
        """
        if not self._of_choice:
            raise IndexError("no event waits")
        choice, waiting = next(iter(self._of_choice.items()))
        event = waiting.popleft()
        if not waiting:
            del self._of_choice[choice]
            self._single.pop(choice, None)
        return event

    def take_all(self) -> list[RequestEvent]:
        """Take all events; the newest one of all is the last."""
        taken = [event for waiting in self._of_choice.values() for event in waiting]
        self._of_choice.clear()
        self._single.clear()
        return taken


class Backlog:
    """Events that a reader has not taken yet. A slow reader gets what has come meanwhile of a
    choice as one event.

    Args:
      take: takes the oldest event that has arrived; raises IndexError where none has.
    """

    def __init__(self, take: Callable[[], RequestEvent]) -> None:
        self._take = take
        # By choice; the one with the newest event is last.
        self._events: dict[int, list[RequestEvent]] = {}

    def pop(self) -> RequestEvent | None:
        """What is new of one choice, the one with the answer last; None where nothing is new."""
        while True:
            try:
                event = self._take()
            except IndexError:
                break
            of_choice = self._events.pop(event.choice, [])
            of_choice.append(event)
            self._events[event.choice] = of_choice
        if not self._events:
            return None
        return merged(self._events.pop(next(iter(self._events))))


class Stream:
    """An iterator of StreamChunks. To close it, or to drop it, aborts a request that has not ended.

    A reader may be slow: the stream keeps what has come meanwhile, and no request waits.
    Several threads may read: each chunk goes to one of them.

    Args:
      session: serves the request; each chunk drives it until there is something new, unless
        another thread does.
      entry: a request whose events are kept for this stream, with a listener of its own.
    """

    def __init__(self, session: Session, entry: Entry) -> None:
        assert entry.events is not None, "no stream's"
        self._session, self._entry = session, entry
        self._backlog = Backlog(entry.events.popleft)
        self._open = True
        self._reading = threading.RLock()  # a callback that reads its own turn's stream is refused

    @property
    def request(self) -> Request:
        """What was submitted."""
        return self._entry.request

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> StreamChunk:
        with self._reading:
            if self._open:
                chunk = self._next_chunk()
                self._open = chunk.output is None
                return chunk
        raise StopIteration

    def close(self) -> None:
        """Stop listening."""
        if self._open:
            self._open = False
            self._session.abort(self._entry.request.id)

    def __del__(self) -> None:
        # The collector may run this anywhere, also in the middle of a turn.
        if self._open and self._entry.answer is None:
            self._session.abort_soon(self._entry.request.id)

    def _next_chunk(self) -> StreamChunk:
        while True:
            closed = self._entry.closed
            chunk = self._backlog.pop()
            if chunk is not None:
                return chunk
            if closed:  # the last event was lost with a turn that was broken off
                answer = self._entry.answer
                assert answer is not None, "a closed entry has its answer"
                return StreamChunk(
                    "", [], answer.finish_reason, answer, request_id=answer.request_id
                )
            self._session.wait_for_news(self._entry)
