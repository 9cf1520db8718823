"""The order in which the cached pages of a pool are evicted."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, Protocol

from pdjax.core.kv_layout import KVLayout
from pdjax.core.messages import shown
from pdjax.core.recompute import RecomputeCost


class BadEviction(RuntimeError):
    """An order has named pages that cannot be evicted; none has been."""


class EvictionOrder(Protocol):
    """The cached pages of one pool, and which of them go first.

    The allocator owns it, tells it of every change, and counts pages itself: an order can name a
    wrong page, which is refused, but cannot lose one. A page that has a holder is not in the order,
    so that it is never evicted.
    """

    def know(self, places: Mapping[int, int]) -> None:
        """These pages can be found from now on, each with its place among the pages of its
        sequence, of which the first has 0. They have holders."""
        ...

    def take(self, pages: Iterable[int]) -> None:
        """Pages have one more holder each. Those that were cached are not any longer; others have
        had a holder all the time, and some may not be known."""
        ...

    def cache(self, pages: Seq[int]) -> None:
        """The last holders of known pages have let go; in the order of their sequence."""
        ...

    def drop(self, pages: Iterable[int]) -> None:
        """Pages are not known any longer; some may be cached, and some may never have been
        known."""
        ...

    def evict(self, count: int) -> list[int]:
        """Take out `count` of the cached pages, the first to go first; at least so many are
        cached. They are not known any longer."""
        ...


class EvictionPolicy(Protocol):
    """Decides which cached pages of a pool are evicted when none is free."""

    def order(self, layout: KVLayout, recompute: RecomputeCost | None) -> EvictionOrder:
        """An empty order for one pool.

        Args:
          layout: of the pool's pages.
          recompute: what it takes to compute their KV again; None where it is not known.

        Raises:
          ValueError: the policy needs what is not known.
        """
        ...


MakeOrder = Callable[[KVLayout], EvictionOrder]
"""Makes an empty order for a pool of this layout."""


def check_evicted(order: EvictionOrder, pages: Any, cached: set[int], count: int) -> None:
    """Refuse pages to evict that are not as many as are needed, or not cached.

    Raises:
      BadEviction: naming the order and what is wrong.
    """
    if isinstance(pages, list) and len(pages) == count:
        chosen = set(pages)
        if len(chosen) == count and chosen <= cached:
            return
    raise BadEviction(
        f"eviction order {type(order).__name__}: {shown(pages)}: must be a list of {count} cached "
        "pages, each once"
    )


class TailsFirst:
    """Evicts what was let go longest ago, and of a sequence the end before the beginning: without
    its predecessors a page cannot be found. That is LRU over the leaves of a tree of prefixes
    (SGLang's RadixAttention, Zheng et al. 2024) without the tree."""

    def __init__(self) -> None:
        # A plain dict would be slow: its front is found by a scan over all that was taken from
        # there before.
        self._pages: OrderedDict[int, None] = OrderedDict()

    def know(self, places: Mapping[int, int]) -> None:
        """See `EvictionOrder`."""

    def take(self, pages: Iterable[int]) -> None:
        """See `EvictionOrder`."""
        for page in pages:
            self._pages.pop(page, None)

    def cache(self, pages: Seq[int]) -> None:
        """See `EvictionOrder`."""
        self._pages.update(dict.fromkeys(reversed(pages)))

    def drop(self, pages: Iterable[int]) -> None:
        """See `EvictionOrder`."""
        self.take(pages)

    def evict(self, count: int) -> list[int]:
        """See `EvictionOrder`."""
        return [self._pages.popitem(last=False)[0] for _ in range(count)]
