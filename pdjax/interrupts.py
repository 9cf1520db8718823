"""Ctrl-C between two turns of the loop, never within one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[None]:
    """A block that SIGINT does not break off: its handler runs when the block ends.

    A second SIGINT within the block runs the handler at once, since the block may never end. Python
    runs handlers in the main thread alone, so that any other thread has nothing to hold back; nor
    has the main thread where SIGINT is ignored or its handler is not Python's.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(before):
        yield
        return
    noted: list[FrameType | None] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(frame)
        if len(noted) > 1:
            noted.clear()
            before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if noted:
            before(signal.SIGINT, noted[0])
