"""Which page holds the KV of which tokens, so that the beginning of a prompt that has been computed
before is not computed again.

The KV of a token depends on all tokens before it. So a page is named by a hash over its own tokens
and the name of the page before it, and two sequences share their pages as far as they share their
tokens, page by page. That is vLLM's automatic prefix caching (Kwon et al. 2023). The hashes make a
flat table of what is a tree of token strings in SGLang's RadixAttention (Zheng et al. 2024).
"""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from hashlib import blake2b
from weakref import WeakKeyDictionary

import numpy as np

from pdjax.core.request import Request
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.partial_pages import PartialPages
from pdjax.host.kv.prefix_account import KeyMemory, PrefixTotals
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.transport import KeptPage

_KEY_BYTES = 16


class PrefixIndex:
    """Finds the pages of one pool by the tokens whose KV lies in them. Whole pages are shared; of
    one that ends, or goes on, otherwise than a sequence does, the beginning may be copied.

    The index answers to keys, which `keys` makes from tokens. A sequence keeps its keys, so that
    each of its tokens is hashed once, however often and in however many pools it is looked up. Keys
    are compared, tokens are not: with 128 bits of BLAKE2b two prefixes of the same key are found
    neither by chance nor on purpose.

    Args:
      allocator: of the pool. It keeps the known pages that have no holder, and tells which it
        evicts.
      page_size: tokens a page.

    Attributes:
      totals: what prompts were found here, and why others were not.
    """

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size={page_size}: must be at least 1")
        allocator.on_evict(self._forget_all)
        self.page_size = page_size
        self._allocator = allocator
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self.totals = PrefixTotals()
        self._seen = KeyMemory()  # keys that were inserted
        self._under_salts = KeyMemory()  # keys that salted sequences would have without their salts
        self._losses = 0  # keys forgotten so far
        self._partial = PartialPages(allocator)
        self._places: dict[int, int] = {}  # of pages, where anybody asks for them
        self._on_evict: list[Callable[[list[KeptPage]], None]] = []
        self._on_forget: list[Callable[[bytes], None]] = []
        self._matched: WeakKeyDictionary[Sequence, tuple[int, int]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._pages)

    def on_evict(self, listener: Callable[[list[KeptPage]], None]) -> None:
        """Call `listener` with the pages that an allocation evicts, all of them at once, before
        they are handed out. To be called while nothing is known."""
        self._on_evict.append(listener)

    def on_forget(self, listener: Callable[[bytes], None]) -> None:
        """Call `listener` with the key of a page that does not hold what it was said to."""
        self._on_forget.append(listener)

    def page_of(self, key: bytes) -> int | None:
        """The page that has a key."""
        return self._pages.get(key)

    def kept(self, page: int) -> KeptPage | None:
        """What is known of a whole page; its place where `on_evict` was called."""
        key = self._keys.get(page)
        return None if key is None else KeptPage(key, self._places.get(page, 0), page)

    def keys(
        self, token_ids: Seq[int] | np.ndarray, salt: bytes = b"", so_far: Seq[bytes] = ()
    ) -> list[bytes]:
        """The keys of the whole pages of a sequence. They do not depend on what is known here, and
        are the same for every index with this page size.

        Args:
          token_ids: all of its tokens, the first one first.
          salt: sequences of different salts share nothing. Without it, a client can learn from the
            time to the first token whether another client has sent the same prompt.
          so_far: keys of its first pages, if they have been made before with the same salt; only
            the rest is hashed.
        """
        size, whole = self.page_size, len(token_ids) // self.page_size
        keys = list(so_far[:whole])
        rest = token_ids[len(keys) * size : whole * size]
        data = np.asarray(rest, dtype=np.int32).tobytes()
        key = keys[-1] if keys else _root(salt)
        page_bytes = size * np.dtype(np.int32).itemsize
        for start in range(0, len(data), page_bytes):
            key = _digest(key + data[start : start + page_bytes])
            keys.append(key)
        return keys

    def match(self, keys: Seq[bytes]) -> list[int]:
        """The pages of the longest known prefix. They are not the caller's, and may be gone after
        the next allocation: `take` them to keep them."""
        pages: list[int] = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def known_tokens(self, sequence: Sequence, most: int) -> int:
        """How many of the first `most` tokens of a sequence lie in known pages, the last of which
        may have to be copied.

        A sequence may wait for its turn for many steps, and is asked about in each. So the count is
        kept, and as long as nothing has been forgotten it can only grow: the walk goes on from
        where it ended. After a loss it begins at the front again.
        """
        keys = keys_of(sequence, self)
        losses, pages = self._matched.get(sequence, (self._losses, 0))
        if losses != self._losses:
            pages = 0
        while pages < len(keys) and keys[pages] in self._pages:
            pages += 1
        self._matched[sequence] = self._losses, pages
        whole = min(pages, max(most, 0) // self.page_size)
        return whole * self.page_size + self._partly(sequence, keys, whole, most)[1]

    def _partly(
        self, sequence: Sequence, keys: Seq[bytes], whole: int, most: int
    ) -> tuple[int, int]:
        """The page whose first tokens are those behind the first `whole` pages of a sequence, and
        how many of its first `most`; 0 of none."""
        first, before = whole * self.page_size, _before(sequence, keys, whole)
        if most <= first or not self._partial.begins(before, sequence.token(first)):
            return 0, 0
        tokens = sequence.tokens(first, min(most, first + self.page_size))
        return self._partial.find(before, tokens)

    def take(self, keys: Seq[bytes], most_tokens: int) -> list[int]:
        """Become a holder of the pages of the longest known prefix of at most `most_tokens` tokens.

        Where the logits of the last token are wanted, that one must be computed: ask for one token
        less than there are. Allocate what else is needed only afterwards, since that may evict
        what could have been taken.
        """
        pages = self.match(keys[: max(most_tokens, 0) // self.page_size])
        self._allocator.share(pages)
        return pages

    def serve(self, sequence: Sequence, tokens: int) -> list[int]:
        """`take` the known whole pages of the first `tokens` tokens for a prefill that begins, and
        count the prompt in `totals` if it is the sequence's first. Where some tokens more are in a
        page that cannot be shared, the sequence's `copied` is that page."""
        keys = keys_of(sequence, self)
        if not sequence.epoch:
            self._count(sequence, keys, tokens)
        pages = self.take(keys, tokens)
        sequence.copied = None
        if rest := tokens - len(pages) * self.page_size:
            page, found = self._partly(sequence, keys, len(pages), tokens)
            assert found == rest, f"{sequence.id}: {found} of {rest} tokens are in a page"
            self._partial.use(page)
            sequence.copied = page
            self.totals.copied += rest
        return pages

    def _count(self, sequence: Sequence, keys: list[bytes], hit: int) -> None:
        totals, size, salt = self.totals, self.page_size, salt_of(sequence.request)
        whole = max(sequence.reusable, 0) // size
        plain = self.keys(sequence.token_ids) if salt else keys
        missed = evicted = isolated = 0
        tokens = size - hit % size  # of the first page: the others may have been copied
        for key, bare in zip(keys[hit // size : whole], plain[hit // size : whole], strict=True):
            missed += tokens
            if key in self._seen:
                evicted += tokens
            elif bare in self._under_salts or (salt and bare in self._seen):
                isolated += tokens
            tokens = size
        if salt:
            self._under_salts.add(plain)
        totals.looked_up += sequence.length
        totals.hit += hit
        totals.evicted += evicted
        totals.isolated += isolated
        totals.never_seen += missed - evicted - isolated
        totals.partial += sequence.length - hit - missed

    def add(self, sequence: Sequence, pages: Seq[int], tokens: int) -> None:
        """`insert` the whole pages among the first `tokens` tokens of a sequence, and let the
        beginnings of those that are new be found, too."""
        keys, size = keys_of(sequence, self), self.page_size
        new = [place for place in range(tokens // size) if keys[place] not in self._pages]
        self.insert(keys, pages, tokens)
        if new:
            first = new[0]
            befores = [_before(sequence, keys, first), *keys[first:]]
            added = [(befores[i - first], pages[i], (i - first) * size) for i in new]
            self._partial.add(added, sequence.tokens(first * size, tokens), size)

    def add_tail(self, sequence: Sequence, pages: Seq[int], tokens: int) -> None:
        """Let the part of a page be found that the first `tokens` tokens of a sequence end in, if
        they do. The caller holds the page, and nothing is written to it any more."""
        keys, place = keys_of(sequence, self), tokens // self.page_size
        content = sequence.tokens(place * self.page_size, tokens)
        if content:
            before = _before(sequence, keys, place)
            self._partial.add_tail(before, pages[place], content, place)

    def insert(self, keys: Seq[bytes], pages: Seq[int], tokens: int) -> None:
        """Make findable the whole pages among the first `tokens` tokens of a sequence.

        If a key is known already, the page that has it keeps it, since other pages may build on
        that one; the page given here for it is a duplicate, stays unknown, and will be free when it
        is let go. To insert the same pages again changes nothing.

        Args:
          keys: of the sequence, at least for those tokens.
          pages: where its KV lies, in order; the caller holds them.
          tokens: how many have their KV there, or will before a step that takes them reads it.

        Raises:
          ValueError: too few keys or pages, a page without a holder, or one that is known to hold
            something else; then nothing is inserted.
        """
        whole = tokens // self.page_size
        if whole > min(len(keys), len(pages)):
            raise ValueError(
                f"tokens={tokens}: {whole} whole pages, "
                f"but {len(keys)} keys and {len(pages)} pages were given"
            )
        new: dict[int, bytes] = {}
        places: dict[int, int] = {}
        for place, (key, page) in enumerate(zip(keys[:whole], pages[:whole], strict=True)):
            if new.get(page, self._keys.get(page, key)) != key:
                raise ValueError(f"page={page}: known already to hold something else")
            if key not in self._pages:
                new[page], places[page] = key, place
        self._add(new, places)

    def keep(self, pages: Iterable[KeptPage]) -> None:
        """Make findable pages that have come from another pool; the caller holds them. As `insert`,
        but for those before them, which need not be known.

        Raises:
          ValueError: a page without a holder; then none is kept.
        """
        new: dict[bytes, KeptPage] = {}
        for each in pages:
            if each.key not in self._pages:
                new.setdefault(each.key, each)
        kept = new.values()
        self._add({each.page: each.key for each in kept}, {each.page: each.place for each in kept})

    def _add(self, keys: dict[int, bytes], places: Mapping[int, int]) -> None:
        if not keys:
            return
        self._allocator.know(places)
        self._seen.add(keys.values())
        self._keys.update(keys)
        self._pages.update((key, page) for page, key in keys.items())
        if self._on_evict:
            self._places.update(places)

    def forget(self, page: int) -> None:
        """Make a page unfindable that does not hold what it was said to, as when the step that
        should have written it has failed. Its holders keep it."""
        key = self._forget(page)
        if key is not None or page in self._partial.tails:
            self._partial.drop([page])
            self._allocator.forget([page])
        if key is not None:
            self._tell_forgotten(key)

    def _forget_all(self, pages: Iterable[int]) -> None:
        """The allocator has evicted these pages."""
        places, evicted = self._places, list[KeptPage]()
        for page in pages:
            place = places.get(page, 0)
            key = self._forget(page)
            if key is not None:
                evicted.append(KeptPage(key, place, page))
        self.totals.evicted_pages += len(evicted)
        for listener in self._on_evict:
            listener(evicted)

    def _forget(self, page: int) -> bytes | None:
        """Take a page out of the tables; returns its key if it was there."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]
            self._places.pop(page, None)
            self._losses += 1
        return key

    def _tell_forgotten(self, key: bytes) -> None:
        for listener in self._on_forget:
            listener(key)

    def forget_key(self, key: bytes) -> None:
        """`forget` the page that has this key, if there is one; those who listen are told in any
        case."""
        page = self._pages.get(key)
        if page is not None:
            self.forget(page)
        else:
            self._tell_forgotten(key)

    def tails_among(self, pages: Iterable[int]) -> set[int]:
        """Those of the pages that are known for a part of them."""
        return self._partial.tails.intersection(pages)

    def clear(self) -> None:
        """Forget everything, as when the weights have changed."""
        self._allocator.forget(self._keys)
        self._partial.clear()
        self._keys.clear()
        self._pages.clear()
        self._places.clear()
        self._losses += 1

    def check(self) -> None:
        """Assert that a page has one key, a key one page, and that the allocator knows the same."""
        assert {page: key for key, page in self._pages.items()} == self._keys, "keys and pages"
        known = self._keys.keys() | self._partial.tails
        assert known == self._allocator.known, "known here or there only"
        self._partial.check()


def keys_of(sequence: Sequence, index: PrefixIndex) -> list[bytes]:
    """The keys of a sequence's whole pages, kept with it; each token is hashed once. They are
    salted by its request."""
    known = sequence.page_keys.get(index.page_size, [])
    if sequence.length // index.page_size > len(known):
        salt = salt_of(sequence.request)
        known = index.keys(sequence.token_ids, salt, so_far=known)
        sequence.page_keys[index.page_size] = known
    return known


def _before(sequence: Sequence, keys: Seq[bytes], place: int) -> bytes:
    """The key of the page before a page of a sequence; of the first one, what its keys begin
    with."""
    return keys[place - 1] if place else _root(salt_of(sequence.request))


def salt_of(request: Request) -> bytes:
    """What the keys of a request are salted with; nothing without a `cache_salt`."""
    salt = request.cache_salt
    # A lone surrogate of JSON has no bytes in UTF-8.
    return b"" if salt is None else salt.encode("utf-8", "surrogatepass")


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_KEY_BYTES).digest()


def _root(salt: bytes) -> bytes:
    """What the key of a first page is made from. No salt gives a key of pages."""
    return blake2b(salt, digest_size=_KEY_BYTES, person=b"cache_salt").digest()
