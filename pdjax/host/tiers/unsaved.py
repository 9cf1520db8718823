"""Cached pages of a pool that have not been looked for in its tier."""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq

from pdjax.host.kv.pools import PoolState
from pdjax.host.kv.prefix_index import PrefixIndex
from pdjax.interfaces.transport import KeptPage

_FREE = 0.5
"""Share of a pool's pages that are free, and not cached, beyond which none is in danger."""


class Unsaved:
    """Pages in the order in which the plain policy evicts them: what was let go longest ago first,
    and of a sequence the end before the beginning.

    Args:
      pool: whose pages they are.
      index: of the pool.
    """

    def __init__(self, pool: PoolState, index: PrefixIndex) -> None:
        self._allocator, self._index = pool.allocator, index
        self._pages: OrderedDict[int, None] = OrderedDict()
        pool.allocator.on_cache(self._add)

    def _add(self, pages: Seq[int]) -> None:
        for page in reversed(pages):
            self._pages.pop(page, None)
            self._pages[page] = None

    @property
    def pressing(self) -> bool:
        """Whether there are any, and few pages of the pool are free."""
        pages = self._allocator
        return bool(self._pages) and pages.free_pages - pages.cached_pages <= _FREE * pages.total

    def take(self, most: int, lacks: Callable[[bytes], bool]) -> list[KeptPage]:
        """At most so many of the first ones that are still cached, and whose keys the tier
        `lacks`."""
        found: list[KeptPage] = []
        while self._pages and len(found) < most:
            page, _ = self._pages.popitem(last=False)
            kept = self._index.kept(page)
            if kept is not None and self._allocator.is_cached(page) and lacks(kept.key):
                found.append(kept)
        return found
