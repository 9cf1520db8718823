"""Eviction by a value that ages: of the GreedyDual family (Cao and Irani, "Cost-Aware WWW Proxy
Caching Algorithms", 1997)."""

import heapq
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq

from pdjax.core.kv_layout import KVLayout
from pdjax.core.recompute import RecomputeCost
from pdjax.host.policies.api import PolicySetup

_STALE = 64
"""Entries of a heap that may be stale before it is made anew, besides as many as are not."""


class AgedOrder:
    """Evicts the page of the least rank: its value, and the age at which it was let go. The age is
    the rank of what was evicted last. So a page that is not used any more goes at last, whatever
    its value once was.

    A page has at least the rank of those behind it that are let go with it: without it they cannot
    be found.

    Args:
      value: of a page, by how often it was used and its place in its sequence; more than 0.
    """

    def __init__(self, value: Callable[[int, int], float]) -> None:
        self._value = value
        self._age = 0.0
        self._uses: dict[int, int] = {}  # of known pages, as their places
        self._places: dict[int, int] = {}
        # Entries of the heap are (rank, number, page); of a cached page the one with this number
        # counts, and of equals the one that came first.
        self._numbers: dict[int, int] = {}
        self._heap: list[tuple[float, int, int]] = []
        self._last = 0

    def know(self, places: Mapping[int, int]) -> None:
        """See `EvictionOrder`."""
        self._places.update(places)
        self._uses.update(dict.fromkeys(places, 1))

    def take(self, pages: Iterable[int]) -> None:
        """See `EvictionOrder`."""
        uses, numbers = self._uses, self._numbers
        for page in pages:
            if page in uses:
                uses[page] += 1
                numbers.pop(page, None)

    def cache(self, pages: Seq[int]) -> None:
        """See `EvictionOrder`."""
        rank = 0.0
        for page in reversed(pages):
            rank = max(rank, self._age + self._value(self._uses[page], self._places[page]))
            self._last += 1
            self._numbers[page] = self._last
            heapq.heappush(self._heap, (rank, self._last, page))
        if len(self._heap) > 2 * len(self._numbers) + _STALE:
            self._heap = [entry for entry in self._heap if self._counts(entry)]
            heapq.heapify(self._heap)

    def drop(self, pages: Iterable[int]) -> None:
        """See `EvictionOrder`."""
        for page in pages:
            if self._uses.pop(page, 0):
                del self._places[page]
                self._numbers.pop(page, None)

    def evict(self, count: int) -> list[int]:
        """See `EvictionOrder`."""
        evicted: list[int] = []
        while len(evicted) < count:
            entry = heapq.heappop(self._heap)
            if self._counts(entry):
                self._age, _, page = entry
                del self._numbers[page], self._uses[page], self._places[page]
                evicted.append(page)
        return evicted

    def _counts(self, entry: tuple[float, int, int]) -> bool:
        return self._numbers.get(entry[2]) == entry[1]


class Lfu:
    """What was used least often; with ageing (LFU-DA, Arlitt et al., "Evaluating Content Management
    Techniques for Web Proxy Caches", 2000), so that what was popular once goes at last. To compute
    a page counts as a use of it."""

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def order(self, layout: KVLayout, recompute: RecomputeCost | None = None) -> AgedOrder:
        """See `EvictionPolicy`."""
        del layout, recompute
        return AgedOrder(lambda uses, place: uses)


class CostAware:
    """What saves the fewest FLOPs a byte: uses times what it takes to compute a page again, over
    its bytes (GreedyDual-Size with Frequency, Cherkasova 1998; FLOPs as Marconi, Pan et al., MLSys
    2025, counts them). A page deep in a long prompt costs more than one at its beginning, as its
    tokens attend to more."""

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def order(self, layout: KVLayout, recompute: RecomputeCost | None = None) -> AgedOrder:
        """See `EvictionPolicy`."""
        if recompute is None:
            raise ValueError(
                'policies.eviction="cost_aware": needs the FLOPs of the model, which are not told '
                "here; a Coordinator takes them as `recompute`"
            )
        size, nbytes, flops = layout.page_size, layout.page_bytes, recompute.flops

        def saved(uses: int, place: int) -> float:
            return uses * flops(place * size, (place + 1) * size) / nbytes

        return AgedOrder(saved)
