"""What was looked for in a prefix index: found, or not, and why not."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

REMEMBERED = 1 << 17
"""Keys that are remembered for at least as long as so many others have come since; about twice as
many take 25 MB at the most. Beyond that what was evicted counts as never seen."""


class KeyMemory:
    """The keys that have come lately, in two halves, of which the older one goes as a whole.

    Args:
      most: keys of a half.
    """

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._new: set[bytes] = set()
        self._old: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._new or key in self._old

    def add(self, keys: Iterable[bytes]) -> None:
        """Remember keys."""
        self._new.update(keys)
        if len(self._new) > self._most:
            self._old, self._new = self._new, set()


@dataclass
class PrefixTotals:
    """Prompt tokens that were looked for when their prefill began, of every sequence once, by what
    came of it; and pages evicted. All from `hit` to `partial` add up to `looked_up`.

    Attributes:
      looked_up: all of them.
      hit: found.
      evicted: in pages that had been there, and were evicted or lost since.
      isolated: in pages that were looked for before, but under another `cache_salt`.
      never_seen: in pages that had not been there.
      partial: behind the last whole page that might be found, and not found: part of a page, or
        with the last token, whose logits are wanted.
      copied: of `hit`, in pages that end or go on otherwise, of which the beginning was copied.
      evicted_pages: pages, not tokens.
    """

    looked_up: int = 0
    hit: int = 0
    evicted: int = 0
    isolated: int = 0
    never_seen: int = 0
    partial: int = 0
    copied: int = 0
    evicted_pages: int = 0

    @property
    def rate(self) -> float | None:
        """The share of tokens that was found; None before the first."""
        return self.hit / self.looked_up if self.looked_up else None

    @property
    def ceiling(self) -> float | None:
        """The share that a cache would have found from which nothing is evicted."""
        return (self.hit + self.evicted) / self.looked_up if self.looked_up else None

    def to_json(self) -> dict[str, int | float | None]:
        """Plain values, each under its name behind "prefix_"."""
        told = {**asdict(self), "rate": self.rate, "ceiling": self.ceiling}
        return {f"prefix_{name}": value for name, value in told.items()}
