"""The pages of a pool and their holders, by id; the bytes that the ids name are on a device."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Seq

from pdjax.core.kv_layout import NULL_PAGE
from pdjax.core.messages import shown
from pdjax.host.kv.eviction import EvictionOrder, TailsFirst, check_evicted


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Hands out the pages of one pool and counts their holders.

    The null page belongs to padding and is never handed out. A page may have several holders. When
    the last holder lets go, the page is free again; where an index knows what lies in it (`know`)
    it is cached: it has no holder, but it can be shared again until it is evicted because a page is
    needed and none is free. So every page is free, cached or used, and a cache costs no page
    (vLLM's automatic prefix caching, Kwon et al. 2023).

    Without an index no page is ever known, and none is cached.

    Args:
      num_pages: pages of the pool, null page included.
      order: which cached pages are evicted first; the allocator's from now on. None takes
        `TailsFirst`.

    Attributes:
      total: pages that can be handed out.
      known: the pages that stay findable without a holder; to be read only.
    """

    def __init__(self, num_pages: int, order: EvictionOrder | None = None) -> None:
        if num_pages < 2:
            raise ValueError(
                f"num_pages={num_pages}: must be at least 2, the null page and one more"
            )
        self.total = num_pages - 1
        self.known: set[int] = set()
        self._on_evict: list[Callable[[Seq[int]], None]] = []
        self._on_change: list[Callable[[], None]] = []
        self._on_cache: list[Callable[[Seq[int]], None]] = []
        # Last freed, first reused: the working set stays small, and a use after free shows at once.
        self._free = [page for page in reversed(range(num_pages)) if page != NULL_PAGE]
        self._cached: set[int] = set()
        self._order: EvictionOrder = TailsFirst() if order is None else order
        self._holders: dict[int, int] = {}

    def on_evict(self, listener: Callable[[Seq[int]], None]) -> None:
        """Call `listener` with the pages that an allocation evicts, all of them at once, before
        they are handed out."""
        self._on_evict.append(listener)

    def on_cache(self, listener: Callable[[Seq[int]], None]) -> None:
        """Call `listener` with pages whose last holders have let go, and that are cached now."""
        self._on_cache.append(listener)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change of what is free, cached or held."""
        self._on_change.append(listener)

    @property
    def free_pages(self) -> int:
        """Pages that can be allocated now; some may be cached."""
        return len(self._free) + len(self._cached)

    @property
    def cached_pages(self) -> int:
        """Pages without a holder that can still be shared."""
        return len(self._cached)

    def is_cached(self, page: int) -> bool:
        """Whether a page has no holder, and can still be shared."""
        return page in self._cached

    @property
    def used_pages(self) -> int:
        """Pages with one holder or several."""
        return len(self._holders)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, or none at all: free ones first, then cached ones in the order of
        their eviction.

        Raises:
          OutOfPages: fewer are free.
          BadEviction: the order names a page that is not cached, or too few.
        """
        if count > self.free_pages:
            raise OutOfPages(f"{count} pages asked for, {self.free_pages} of {self.total} are free")
        lacking = count - len(self._free)
        evicted = self._evict(lacking) if lacking > 0 else []
        at_hand = max(0, -lacking)
        pages = self._free[at_hand:][::-1] + evicted
        del self._free[at_hand:]
        self._holders.update(dict.fromkeys(pages, 1))
        self._changed()
        return pages

    def claim(self, pages: Seq[int]) -> None:
        """Take these pages, in which something lies already.

        Raises:
          ValueError: one of them is not free, or named twice; then none is taken.
        """
        claimed = set(pages)
        if len(claimed) < len(pages) or not claimed <= set(self._free):
            wrong = sorted(claimed.difference(self._free)) or list(pages)
            raise ValueError(f"pages={shown(wrong)}: must be free, and each named once")
        self._free = [page for page in self._free if page not in claimed]
        self._holders.update(dict.fromkeys(pages, 1))
        self._changed()

    def share(self, pages: Iterable[int]) -> None:
        """Become one more holder of each of `pages`, or the first one where it is cached.

        Raises:
          ValueError: one of them is free; then none is shared.
        """
        pages = list(pages)
        self._check_held([page for page in set(pages) if page not in self._cached], "shared")
        self._cached.difference_update(pages)
        self._order.take(pages)
        holders = self._holders
        for page in pages:
            holders[page] = holders.get(page, 0) + 1
        self._changed()

    def free(self, pages: Iterable[int]) -> None:
        """Let go of `pages`, once for each time that a page is named.

        They are to be in the order of their sequence, which orders of eviction go by: without its
        predecessors a page cannot be found.

        Raises:
          ValueError: one of them has fewer holders than that; then none is freed.
        """
        pages = list(pages)
        self._check_held(pages, "freed")
        holders, cached = self._holders, list[int]()
        for page in pages:
            left = holders.pop(page) - 1
            if left:
                holders[page] = left
            else:
                (cached if page in self.known else self._free).append(page)
        if cached:
            self._cached.update(cached)
            self._order.cache(cached)
            for listener in self._on_cache:
                listener(cached)
        self._changed()

    def know(self, places: Mapping[int, int]) -> None:
        """Let pages be cached, instead of free, when their last holders let go.

        Args:
          places: of each page that was not known before, its place among those of its sequence.

        Raises:
          ValueError: one of them has no holder, so anything may lie there; then none is known.
        """
        self._check_held(list(places), "made known")
        self.known.update(places)
        self._order.know(places)

    def forget(self, pages: Iterable[int]) -> None:
        """Undo `know`: those that are cached are free at once. The others are left as they are."""
        pages = list(pages)
        self._order.drop(pages)
        self.known.difference_update(pages)
        for page in pages:
            if page in self._cached:
                self._cached.remove(page)
                self._free.append(page)
        self._changed()

    def check(self, held: Iterable[int]) -> None:
        """Assert that every page is free, cached or held, and held by exactly those in `held`.

        Args:
          held: the pages of every holder, a page once for each of them.
        """
        assert self.free_pages + self.used_pages == self.total, "pages were lost or made"
        everyone = {*self._free, *self._cached, *self._holders}
        assert len(everyone) == self.total and NULL_PAGE not in everyone, "free and held"
        assert self.known.isdisjoint(self._free), "free and known"
        assert self._cached <= self.known <= everyone, "cached, but not known"
        expected = Counter(held)
        assert expected == self._holders, (
            f"leaked pages {sorted(self._holders.keys() - expected.keys())}, "
            f"used after free {sorted(expected.keys() - self._holders.keys())}"
        )

    def _evict(self, count: int) -> list[int]:
        pages = self._order.evict(count)
        check_evicted(self._order, pages, self._cached, count)
        self._cached.difference_update(pages)
        self.known.difference_update(pages)
        for listener in self._on_evict:
            listener(pages)
        return pages

    def _changed(self) -> None:
        for listener in self._on_change:
            listener()

    def _check_held(self, pages: Collection[int], verb: str) -> None:
        """Refuse pages that have fewer holders than times that they are named."""
        if len(once := set(pages)) == len(pages) and once <= self._holders.keys():
            return  # nearly always, and found out faster than by counting
        for page, holders in Counter(pages).items():
            if self._holders.get(page, 0) < holders:
                raise ValueError(
                    f"page={page}: {verb} by {holders}, but held by {self._holders.get(page, 0)}"
                )
