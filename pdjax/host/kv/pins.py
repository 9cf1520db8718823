"""Prefixes that are pinned: their pages are held for a time, so that none of them is evicted."""

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from pdjax.host.kv.pages import PageAllocator


class _Pin(NamedTuple):
    """The pages of a prefix, held until a moment."""

    pages: tuple[int, ...]
    until: float


@dataclass
class PinTotals:
    """What became of prefixes that were to be pinned.

    Attributes:
      pinned: so many were, those that were again included.
      refused: there was no room for so many beside those that were.
    """

    pinned: int = 0
    refused: int = 0


class PrefixPins:
    """The pinned prefixes of one pool, each by the key of its last page; a holder of their pages.

    Args:
      allocator: of the pool.
      most: pages that may be pinned at a time, over all prefixes.

    Attributes:
      totals: what became of those that were to be pinned.
      earliest: no pin ends before this moment; infinite where there is none.
    """

    def __init__(self, allocator: PageAllocator, most: int) -> None:
        self.most, self.totals = most, PinTotals()
        self.earliest = inf
        self._allocator = allocator
        self._pins: dict[bytes, _Pin] = {}
        self._holders: Counter[int] = Counter()  # pins by page

    def __len__(self) -> int:
        return len(self._pins)

    @property
    def pages(self) -> int:
        """Pages that are pinned; one that two prefixes have in common is one."""
        return len(self._holders)

    def held(self) -> Iterator[int]:
        """The pages of every prefix, a page once for each of them."""
        return self._holders.elements()

    def pin(self, key: bytes, pages: Seq[int], until: float) -> bool:
        """Hold the pages of a prefix until a moment, in place of the moment that was said before.
        Returns whether there was room for that.

        Args:
          key: of the prefix's last page.
          pages: of the prefix, which have holders or are cached.
          until: moment of the clock, seconds.
        """
        new = sum(page not in self._holders for page in pages)
        if self.pages + new > self.most:
            self.totals.refused += 1
            return False
        self._allocator.share(pages)
        self.unpin(key)
        self._holders.update(pages)
        self._pins[key] = _Pin(tuple(pages), until)
        self.earliest = min(self.earliest, until)
        self.totals.pinned += 1
        return True

    def unpin(self, key: bytes) -> None:
        """Let go of a prefix, if it is pinned."""
        pin = self._pins.pop(key, None)
        if pin is not None:
            self._holders -= Counter(pin.pages)
            self._allocator.free(pin.pages)

    def expire(self, now: float) -> None:
        """Let go of the prefixes whose moment has come."""
        if now < self.earliest:
            return
        for key in [key for key, pin in self._pins.items() if pin.until <= now]:
            self.unpin(key)
        self.earliest = min((pin.until for pin in self._pins.values()), default=inf)

    def clear(self) -> None:
        """Let go of all of them, as when the pool has lost its pages."""
        for key in list(self._pins):
            self.unpin(key)
