"""A pool of pages, as the host keeps it."""

from dataclasses import dataclass

from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.host.kv.eviction import EvictionOrder
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.prefix_index import PrefixIndex


@dataclass(eq=False)
class PoolState:
    """The pages of a pool. Engines that share a pool share this; a pool need not have an engine.

    Attributes:
      id: its name.
      layout: of its pages.
      allocator: hands its pages out.
      prefixes: finds the pages of what has been computed; None where nothing is kept.
      leaving: pages that hand-offs hold at their sending end, and let go of when they are complete.
    """

    id: PoolId
    layout: KVLayout
    allocator: PageAllocator
    prefixes: PrefixIndex | None
    leaving: int = 0

    @classmethod
    def of(
        cls, pool: PoolId, layout: KVLayout, num_pages: int, order: EvictionOrder | None
    ) -> "PoolState":
        """A pool whose pages, null page included, are all free.

        Args:
          order: in which cached pages are evicted; None keeps no prefix.
        """
        allocator = PageAllocator(num_pages, order)
        index = None if order is None else PrefixIndex(allocator, layout.page_size)
        return cls(pool, layout, allocator, index)

    @property
    def tokens(self) -> int:
        """Tokens that the pool can hold."""
        return self.allocator.total * self.layout.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return self.layout.pages_for(tokens)
