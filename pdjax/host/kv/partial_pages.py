"""Finds pages that begin with the tokens of a sequence and then end, or go on differently.

Such a page cannot be shared, since its end would be written by two. It is copied, and the copy is
written: copy on write, as of a process's memory (vLLM's blocks, Kwon et al. 2023).
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np

from pdjax.host.kv.pages import PageAllocator

_MOST_ALIKE = 8
"""Pages behind the same prefix that begin with the same token, and are looked at: the newest."""


Beginning = tuple[bytes, int]
"""The key of the page before a page, and its own first token."""


_Content = tuple[Beginning, np.ndarray, int, int]
"""How a page begins, and where its tokens are: `[start, stop)` of i32[n], which the pages have in
common that were added together. A plain tuple: thousands are made in a turn."""


class PartialPages:
    """The content of pages of one pool, by the prefix before each.

    A page is added when its first tokens are there for good: they are never written again. The tail
    of a sequence is known to the allocator by this alone.

    Args:
      allocator: of the pool. It tells which pages it evicts.

    Attributes:
      tails: the pages that are known for a part of them; to be read only.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        allocator.on_evict(self.drop)
        self._allocator = allocator
        self._alike: dict[Beginning, list[int]] = {}
        self._contents: dict[int, _Content] = {}
        self.tails: set[int] = set()

    def add(self, pages: Iterable[tuple[bytes, int, int]], tokens: Seq[int], size: int) -> None:
        """Add pages of a sequence. What was known of one before, as of a tail that has become a
        whole page, is so no longer.

        Args:
          pages: the key of the page before each, the page, and where its tokens begin.
          tokens: of the sequence.
          size: tokens a page; the last one may have fewer.
        """
        array, contents, alike = np.array(tokens, np.int32), self._contents, self._alike
        for before, page, start in pages:
            beginning = before, tokens[start]
            if page in contents:
                self.drop([page])
            contents[page] = beginning, array, start, start + size
            others = alike.get(beginning)
            if others is None:
                alike[beginning] = [page]
                continue
            others.append(page)
            if len(others) > _MOST_ALIKE:
                del others[0]

    def add_tail(self, before: bytes, page: int, tokens: Seq[int], place: int) -> None:
        """Add a page that has a holder and is not whole, and let it be cached. A page that begins
        with these tokens already makes it needless.

        Args:
          before: the key of the page before it.
          tokens: that are in it.
          place: of the page among those of its sequence.
        """
        if page in self._contents or self.find(before, tokens)[1] == len(tokens):
            return
        self._allocator.know({page: place})
        self.tails.add(page)
        self.add([(before, page, 0)], tokens, len(tokens))

    def begins(self, before: bytes, token: int) -> bool:
        """Whether any page behind this one begins with a token."""
        return (before, token) in self._alike

    def find(self, before: bytes, tokens: Seq[int]) -> tuple[int, int]:
        """The page that begins with most of these tokens, and how many; 0 of none.

        Args:
          before: the key of the page before it.
          tokens: that are wanted in it, of a page at the most.
        """
        page, most = 0, 0
        alike = self._alike.get((before, tokens[0])) if tokens else None
        if alike is None:
            return page, most
        wanted = np.array(tokens, np.int32)
        for other in alike:
            _, there, start, stop = self._contents[other]
            found = there[start : min(stop, start + len(wanted))]
            differ = np.flatnonzero(found != wanted[: len(found)])
            same = int(differ[0]) if len(differ) else len(found)
            if same > most:
                page, most = other, same
        return page, most

    def use(self, page: int) -> None:
        """A page has been copied: it is as young as one that was shared, if it is cached."""
        self._allocator.share([page])
        self._allocator.free([page])

    def drop(self, pages: Iterable[int]) -> None:
        """Pages are not known any longer."""
        for page in pages:
            content = self._contents.pop(page, None)
            self.tails.discard(page)
            if content is None:
                continue
            alike = self._alike.get(content[0], [])
            if page in alike:
                alike.remove(page)
                if not alike:
                    del self._alike[content[0]]

    def clear(self) -> None:
        """Forget everything."""
        self._allocator.forget(self.tails)
        self._alike.clear()
        self._contents.clear()
        self.tails.clear()

    def check(self) -> None:
        """Assert that each table says what the other does, and that tails are known."""
        assert self.tails <= self._allocator.known, "tails that are not known"
        assert self.tails <= self._contents.keys(), "tails without content"
        for beginning, pages in self._alike.items():
            assert pages and len(pages) <= _MOST_ALIKE, "pages that are alike"
            assert len(set(pages)) == len(pages), "a page twice"
            assert self._contents.keys() >= set(pages), "pages without content"
            assert all(self._contents[each][0] == beginning for each in pages), "elsewhere"
