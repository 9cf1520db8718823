"""Delays Ctrl-C to the end of a turn of the loop."""

import signal
import threading
from importlib import import_module
from types import FrameType
from typing import Any

# `signal.signal` and `signal.getsignal` look each handler up in an enum and catch the error that
# any function causes there. That takes longer than all else that a session does in a turn. The
# functions of `_signal` skip the lookup.
_SIGNALS: Any = import_module("_signal")


class held_interrupts:
    """Context manager that delays SIGINT: the handler runs when the block ends.

    A second SIGINT within the block runs the handler at once, since the block may never end. The
    context manager does nothing outside the main thread, where Python runs no handlers, and where
    SIGINT is ignored or its handler is not a Python function.
    """

    __slots__ = ("_handler", "_held_back")

    def __enter__(self) -> None:
        self._held_back: list[FrameType | None] = []
        in_main = threading.get_ident() == threading.main_thread().ident
        self._handler: Any = _SIGNALS.getsignal(signal.SIGINT) if in_main else None
        if callable(self._handler):
            _SIGNALS.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if callable(self._handler):
            _SIGNALS.signal(signal.SIGINT, self._handler)
            if self._held_back:
                self._handler(signal.SIGINT, self._held_back[0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._held_back.append(frame)
        if len(self._held_back) > 1:
            self._held_back.clear()
            self._handler(number, frame)
