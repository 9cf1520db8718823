"""Tells a person what a long start, or a long answer, is doing.

Where stderr is a terminal or a notebook, each phase is a bar. Elsewhere, as in a log or a pipe, it
is a line when it begins and one every few seconds while it lasts:

    pdjax: reading weights, 0 of 272 arrays
    pdjax: compiling, 12 of 31 shapes, 9 s
    pdjax: ready after 21 s
"""

import sys
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any, TypeVar

from pdjax.core.clock import Clock, WallClock

ItemT = TypeVar("ItemT")
Advance = Callable[[int], object]
"""Called with how many more of a phase's units are done."""

DELAY_S = 1.0
"""What has ended after so many seconds is not worth a line."""
EVERY_S = 4.0
"""Seconds between two lines of a phase."""


class Progress:
    """Phases, one after another.

    Args:
      show: False tells nothing.
      clock: tells how long it has been; wall time unless given.
    """

    def __init__(self, show: bool = True, clock: Clock | None = None) -> None:
        self._stream = sys.stderr if show else None
        self._bars = self._stream is not None and _shows_bars(self._stream)
        self._clock = clock or WallClock()
        self._began = self._clock.now()
        self._told = False

    @property
    def shown(self) -> bool:
        """Whether anything is told."""
        return self._stream is not None

    @contextmanager
    def phase(self, what: str, total: int = 1, unit: str = "") -> Iterator[Advance]:
        """A block that does `what`.

        Args:
          what: a few words.
          total: units of it; `unit` names them, in the plural. Without a name they are not counted.
        """
        if self._stream is None:
            yield lambda count: None
        elif self._bars:
            from tqdm.auto import tqdm

            form = None if unit else "{desc} [{elapsed}]"
            options: dict[str, Any] = {"unit": f" {unit}", "delay": DELAY_S, "leave": False}
            with tqdm(total=total, desc=what, bar_format=form, **options) as bar:
                yield bar.update
        else:
            with self._lines(what, total, unit) as advance:
                yield advance

    def each(self, items: Seq[ItemT], what: str, unit: str) -> Iterator[ItemT]:
        """The items, one after another, as a phase that does `what` with them."""
        with self.phase(what, len(items), unit) as advance:
            for item in items:
                yield item
                advance(1)

    def end(self, what: str) -> None:
        """Say that all phases are over, if any of them has been told of by lines."""
        if self._told:
            self._say(f"{what} after {self._clock.now() - self._began:.0f} s")

    @contextmanager
    def _lines(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        done, over, began = 0, threading.Event(), self._clock.now()

        def advance(count: int) -> None:
            nonlocal done
            done += count

        def tell() -> None:
            since = self._clock.now() - began
            count = f", {done} of {total} {unit}" if unit else ""
            self._say(f"{what}{count}" + (f", {since:.0f} s" if since >= 1 else ""))

        def watch() -> None:
            if over.wait(max(0.0, DELAY_S - (self._clock.now() - self._began))):
                return
            tell()
            while not over.wait(EVERY_S):
                tell()

        watcher = threading.Thread(target=watch, name="pdjax progress", daemon=True)
        try:
            watcher.start()
            yield advance
        finally:
            over.set()
            watcher.join()

    def _say(self, text: str) -> None:
        self._told = True
        try:
            print(f"pdjax: {text}", file=self._stream, flush=True)
        except (OSError, ValueError):  # nobody reads it any more
            self._stream = None


def _shows_bars(stream: Any) -> bool:
    return "ipykernel" in sys.modules or stream.isatty()
