"""Who holds which page of a pool. Here are only ids; the bytes that they name are on a device."""

from collections import Counter
from collections.abc import Iterable

from pdjax.kv_layout import NULL_PAGE


class OutOfPages(RuntimeError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Hands out the pages of one pool and counts who holds them.

    The null page belongs to padding and is never handed out. A page may have several holders; it is
    free again when the last one lets go.

    Args:
      num_pages: pages of the pool, null page included.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(
                f"num_pages={num_pages}: must be at least 2, the null page and one more"
            )
        self.total = num_pages - 1
        # Last freed, first reused: the working set stays small, and a use after free shows at once.
        self._free = [page for page in reversed(range(num_pages)) if page != NULL_PAGE]
        self._holders: dict[int, int] = {}

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def used_pages(self) -> int:
        """Pages that somebody holds, however many do."""
        return len(self._holders)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, or none at all.

        Raises:
          OutOfPages: fewer are free.
        """
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} of {self.total} are free")
        pages = [self._free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Become one more holder of each of `pages`.

        Raises:
          ValueError: nobody holds one of them; then none is shared.
        """
        pages = list(pages)
        self._check_held(Counter(set(pages)), "shared")
        for page in pages:
            self._holders[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Let go of `pages`, once for each time that a page is named.

        Raises:
          ValueError: one of them has fewer holders than that; then none is freed.
        """
        pages = list(pages)
        self._check_held(Counter(pages), "freed")
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                self._free.append(page)

    def check(self, held: Iterable[int]) -> None:
        """Assert that every page is either free or held, and held by exactly those in `held`.

        Args:
          held: the pages of every holder, a page once for each of them.
        """
        assert self.free_pages + self.used_pages == self.total, "pages were lost or made"
        everyone = {*self._free, *self._holders}
        assert len(everyone) == self.total and NULL_PAGE not in everyone, "free and held"
        expected = Counter(held)
        assert expected == self._holders, (
            f"leaked pages {sorted(self._holders.keys() - expected.keys())}, "
            f"used after free {sorted(expected.keys() - self._holders.keys())}"
        )

    def _check_held(self, needed: Counter[int], verb: str) -> None:
        for page, holders in needed.items():
            if self._holders.get(page, 0) < holders:
                raise ValueError(
                    f"page={page}: {verb} by {holders}, but held by {self._holders.get(page, 0)}"
                )
