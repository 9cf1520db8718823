"""A thread that drives a session's turns, for programs whose own threads shall not."""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

_LOG = logging.getLogger("pdjax")

MOST_BROKEN_TURNS = 3
"""Turns in a row that may be broken off before the requests are given up."""


class CoordinatorThread:
    """Drives turns while there is work, and sleeps while there is none.

    Args:
      turn: drives one turn.
      has_work: whether a turn may bring something.
      failed: told what has broken a turn off.
      give_up: told so, too, where `MOST_BROKEN_TURNS` in a row were broken off: requests would wait
        for ever.
    """

    def __init__(
        self,
        turn: Callable[[], object],
        has_work: Callable[[], bool],
        failed: Callable[[BaseException], None],
        give_up: Callable[[BaseException], None],
    ) -> None:
        self._turn, self._has_work = turn, has_work
        self._failed, self._give_up = failed, give_up
        self._broken = 0  # turns, in a row
        # `put` of a SimpleQueue may come in the middle of another one, as from a finaliser.
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pdjax coordinator", daemon=True)

    def start(self) -> None:
        """Begin to drive."""
        self._thread.start()

    def wake(self) -> None:
        """Let the thread look for work, if it sleeps."""
        self._calls.put(None)

    def stop(self) -> None:
        """Let the current turn end, and wait until the thread has ended."""
        self._stopping = True
        self.wake()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            while not self._calls.empty():
                self._calls.get()
            # What has come since is found here, or has left a call that ends the sleep.
            if self._has_work():
                self._drive()
            else:
                self._calls.get()

    def _drive(self) -> None:
        try:
            self._turn()
            self._broken = 0
        except BaseException as error:  # whatever it is, other requests need the thread
            _LOG.error("a turn was broken off", exc_info=error)
            self._failed(error)
            self._broken += 1
            if self._broken >= MOST_BROKEN_TURNS:
                self._broken = 0
                self._give_up(error)
