"""A thread that makes requests with guides, which may take a while, and the bound of its queue."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pdjax.host.coordinator import Coordinator

ResultT = TypeVar("ResultT")


class GuideQueue:
    """Makes requests one after another; safe from any thread. Guides are compiled meanwhile, so
    that one which takes a second delays other guides alone.

    Args:
      coordinator: has room for so many sequences: those whose requests are being made count as if
        they waited there.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._thread = ThreadPoolExecutor(1, "pdjax guides")
        self._lock = threading.Lock()
        self._choices = 0  # of requests that are being made

    def submit(self, make: Callable[[], ResultT], choices: int | None) -> "Future[ResultT]":
        """Let the thread make a request of so many choices; None is patient, and never refused.

        Raises:
          QueueFull: they would have no room.
        """
        count = choices or 0
        with self._lock:
            if choices is not None:
                self._coordinator.check_room(choices, self._choices)
            made = self._thread.submit(make)
            self._choices += count
        made.add_done_callback(lambda _: self._leave(count))
        return made

    def _leave(self, choices: int) -> None:
        with self._lock:
            self._choices -= choices

    def close(self) -> None:
        """Make none any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
