"""Threads that follow the guides of sequences, so that no row waits for the masks of another.

To add a token to a guide and to work out the mask behind it takes a twentieth of a millisecond for
most forms, and some milliseconds for hard ones. llguidance lets go of Python's lock meanwhile.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pdjax.core.messages import reason_of
from pdjax.host.sequences.sequence import Sequence

_PATIENCE_S = 2e-3
"""How long a turn waits for the masks of rows whose tokens it has read, since a row whose mask
comes just after the next tick is dispatched sits out one more. Ticks in flight cover the wait."""


class Advanced(NamedTuple):
    """A sequence whose constraint has taken its newest token; or why it could not."""

    sequence: Sequence
    error: Exception | None


class GuideThreads:
    """Advances constraints, a sequence's one after another, in the order in which they are given.

    Args:
      threads: how many at the most; they are begun when there is work.
      wake: called when there is something to take, by one of them.
    """

    def __init__(self, threads: int, wake: Callable[[], None]) -> None:
        self._threads, self._wake = threads, wake
        self._pool = ThreadPoolExecutor(threads, "pdjax guides")
        self._lock = threading.Lock()
        self._todo: deque[Sequence] = deque()
        self._working = 0  # threads that do
        self._at_rest = threading.Event()
        self._is_new = False  # something has been given since the last `take`
        self._done: deque[Advanced] = deque()

    @property
    def any_done(self) -> bool:
        """Whether there is something to take."""
        return bool(self._done)

    @property
    def busy(self) -> bool:
        """Whether something has been given that has not been taken."""
        return bool(self._todo or self._working or self._done)

    def advance(self, sequence: Sequence) -> None:
        """Let the constraint of a sequence take its newest token."""
        with self._lock:
            self._todo.append(sequence)
            self._is_new = True
            self._at_rest.clear()
            if self._working < self._threads:
                self._pool.submit(self._work)
                self._working += 1

    def take(self) -> Iterator[Advanced]:
        """What has been done since the last time; waits a moment for what was given since then.
        What breaks the caller off before it asks for the next comes again."""
        if self._is_new:
            self._is_new = False
            self._at_rest.wait(_PATIENCE_S)
        for _ in range(len(self._done)):
            yield self._done[0]
            self._done.popleft()

    def close(self) -> None:
        """Begin nothing any more."""
        with self._lock:
            self._todo.clear()
        self._pool.shutdown(wait=False)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._todo:
                    self._working -= 1
                    if not self._working:
                        self._at_rest.set()
                    return
                sequence = self._todo.popleft()
            try:
                error = advanced(sequence)
            except BaseException as panic:  # of llguidance: no Exception, and nobody's interrupt
                error = RuntimeError(reason_of(panic))
            self._done.append(Advanced(sequence, error))
            self._wake()


def advanced(sequence: Sequence) -> Exception | None:
    """Let the constraint of a sequence take its newest token; returns why it can't."""
    assert sequence.constraint is not None, f"{sequence.id} may choose any token"
    try:
        sequence.constraint.advance(sequence.output[-1], last=not sequence.tokens_left)
    except Exception as error:
        return error
    return None
