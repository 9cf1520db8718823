"""A pool of pages, as the host keeps it."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.host.kv.eviction import EvictionOrder
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.pins import PrefixPins
from pdjax.host.kv.prefix_index import PrefixIndex, keys_of
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.transport import KeptPage


@dataclass(eq=False)
class PoolState:
    """The pages of a pool. Engines that share a pool share this; a pool need not have an engine.

    Attributes:
      id: its name.
      layout: of its pages.
      allocator: hands its pages out.
      prefixes: finds the pages of what has been computed; None where nothing is kept.
      pins: holds the pages of pinned prefixes; None where nothing is kept.
      leaving: pages that hand-offs hold at their sending end, and let go of when they are complete.
    """

    id: PoolId
    layout: KVLayout
    allocator: PageAllocator
    prefixes: PrefixIndex | None
    pins: PrefixPins | None = None
    leaving: int = 0

    @classmethod
    def of(
        cls,
        pool: PoolId,
        layout: KVLayout,
        num_pages: int,
        order: EvictionOrder | None,
        most_pinned: int = 0,
        kept: Seq[KeptPage] = (),
    ) -> "PoolState":
        """A pool whose pages, null page included, are free, but for those that are known from the
        start.

        Args:
          order: in which cached pages are evicted; None keeps no prefix.
          most_pinned: pages that may be pinned at a time.
          kept: what lies there, the least recently used first; of no use without an order.
        """
        allocator = PageAllocator(num_pages, order)
        if order is None:
            return cls(pool, layout, allocator, None)
        index, pins = PrefixIndex(allocator, layout.page_size), PrefixPins(allocator, most_pinned)
        if kept:
            allocator.claim([each.page for each in kept])
            index.keep(kept)
            for each in kept:  # one by one, so that they are evicted in this order
                allocator.free([each.page])
        return cls(pool, layout, allocator, index, pins)

    @property
    def tokens(self) -> int:
        """Tokens that the pool can hold."""
        return self.allocator.total * self.layout.page_size

    def pin(self, sequence: Sequence, until: float) -> bool:
        """Hold the known whole pages of a sequence's prompt until a moment. Returns whether there
        are any, and room for them among those that are pinned."""
        if self.prefixes is None or self.pins is None:
            return False
        keys = keys_of(sequence, self.prefixes)[: sequence.prompt_len // self.layout.page_size]
        pages = self.prefixes.match(keys)
        return bool(pages) and self.pins.pin(keys[len(pages) - 1], pages, until)

    def unpin(self, sequence: Sequence) -> None:
        """Let go of the prompt of a sequence, if it is pinned."""
        if self.prefixes is not None and self.pins is not None:
            keys = keys_of(sequence, self.prefixes)
            for key in keys[: sequence.prompt_len // self.layout.page_size][-1:]:
                self.pins.unpin(key)

    def written(self, sequence: Sequence) -> None:
        """Nothing more is written to the pages of a sequence, whose KV is right: the part of a page
        that it ends in can be found, too. There is none of its newest token's."""
        if self.prefixes is not None and sequence.output:
            self.prefixes.add_tail(sequence, sequence.pages, sequence.length - 1)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return self.layout.pages_for(tokens)
