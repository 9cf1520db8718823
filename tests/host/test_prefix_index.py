"""The prefix index: unit tests, and random walks against a model that is too simple to be wrong."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pdjax.host.kv.eviction import EvictionOrder
from pdjax.host.kv.pages import OutOfPages, PageAllocator
from pdjax.host.kv.prefix_index import PrefixIndex

PAGE_SIZE = 4


def make(num_pages=17, page_size=PAGE_SIZE, order=None):
    allocator = PageAllocator(num_pages, order)
    return allocator, PrefixIndex(allocator, page_size)


def cache(allocator, index, token_ids):
    """Compute the KV of these tokens, make it findable, and let it go. Returns the pages."""
    keys = index.keys(token_ids)
    pages = allocator.allocate(-(-len(token_ids) // index.page_size))
    index.insert(keys, pages, len(token_ids))
    allocator.free(pages)
    index.check()
    return pages


# Keys.


def test_a_key_depends_on_all_tokens_up_to_the_end_of_its_page():
    _, index = make()
    tokens = list(range(12))
    keys = index.keys(tokens)
    assert len(keys) == len(set(keys)) == 3
    for position in range(12):
        other = index.keys([*tokens[:position], 99, *tokens[position + 1 :]])
        same = position // PAGE_SIZE
        assert other[:same] == keys[:same]
        assert not set(other[same:]) & set(keys[same:])


def test_equal_pages_in_different_places_have_different_keys():
    _, index = make()
    assert len(set(index.keys([7] * 16))) == 4


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 11])
def test_only_whole_pages_have_keys(length):
    _, index = make()
    tokens = list(range(20))
    assert index.keys(tokens[:length]) == index.keys(tokens)[: length // PAGE_SIZE]


@pytest.mark.parametrize("as_type", [tuple, np.int32, np.int64, np.uint32])
def test_keys_are_those_of_the_numbers_whatever_they_come_in(as_type):
    _, index = make()
    tokens = [0, 1, 2**31 - 1, 5, 150_000, 8, 9, 3, 4]
    given = tuple(tokens) if as_type is tuple else np.array(tokens, as_type)
    assert index.keys(given) == index.keys(tokens)


def test_keys_are_stable_across_processes():
    _, index = make()
    assert index.keys(range(4))[0].hex() == "daacb8cf0d664237b8581fa6277e4253"


def test_no_salt_is_a_prefix():
    _, index = make()
    prefix = index.keys(range(4))[0]
    salt = prefix + np.arange(4, 8, dtype=np.int32).tobytes()
    assert index.keys(range(8, 12), salt)[0] != index.keys(range(12))[2]


@pytest.mark.parametrize("salt", [b"", b"somebody"])
def test_keys_grow_with_the_sequence(salt):
    _, index = make()
    tokens = list(range(100, 122))
    keys: list[bytes] = []
    for length in range(len(tokens) + 1):
        keys = index.keys(tokens[:length], salt, keys)
        assert keys == index.keys(tokens[:length], salt)
    assert index.keys(tokens[:9], salt, keys) == keys[:2]


def test_salts_share_nothing():
    _, index = make()
    tokens = list(range(16))
    salted = [index.keys(tokens, salt) for salt in (b"", b"a", b"b", b"a" * 100)]
    assert len({key for keys in salted for key in keys}) == 16


# Finding, taking, inserting, forgetting.


def test_nothing_is_found_at_first():
    allocator, index = make()
    keys = index.keys(range(16))
    assert index.match(keys) == index.take(keys, 16) == []
    allocator.check([])


def test_the_longest_known_prefix_is_found():
    allocator, index = make()
    pages = cache(allocator, index, list(range(14)))
    assert len(index) == allocator.cached_pages == 3, "the fourth page is not whole"
    assert index.match(index.keys(range(40))) == pages[:3]
    assert index.match(index.keys([*range(8), 99, *range(9, 40)])) == pages[:2]
    assert index.match(index.keys(range(11))) == pages[:2]
    assert index.match(index.keys(range(1, 40))) == []
    assert index.match(index.keys(range(40), b"somebody else")) == []
    assert allocator.used_pages == 0, "looking is not taking"


@pytest.mark.parametrize(
    ("most_tokens", "expected"), [(-1, 0), (0, 0), (3, 0), (4, 1), (11, 2), (12, 3), (99, 3)]
)
def test_what_is_taken_is_held(most_tokens, expected):
    allocator, index = make()
    pages = cache(allocator, index, list(range(12)))
    taken = index.take(index.keys(range(20)), most_tokens)
    assert taken == pages[:expected]
    allocator.check(taken)
    everything = allocator.allocate(allocator.free_pages)
    assert not set(everything) & set(taken)
    assert index.match(index.keys(range(20))) == taken


def test_what_is_held_can_be_taken_by_another():
    allocator, index = make()
    keys, pages = index.keys(range(8)), allocator.allocate(2)
    index.insert(keys, pages, 8)
    assert index.take(keys, 8) == pages
    allocator.check(pages * 2)


def test_a_sequence_becomes_findable_as_it_grows():
    allocator, index = make()
    keys, pages = index.keys(range(12)), allocator.allocate(3)
    for tokens in range(13):
        index.insert(keys, pages, tokens)
        assert index.match(keys) == pages[: tokens // PAGE_SIZE]
        index.check()


def test_a_prefix_is_evicted_from_its_end():
    allocator, index = make(num_pages=5)
    pages, keys = cache(allocator, index, list(range(16))), index.keys(range(16))
    for left in reversed(range(4)):
        assert allocator.allocate(1) == [pages[left]]
        assert index.match(keys) == pages[:left]
        index.check()
    assert len(index) == 0


def test_the_older_page_stays_and_the_duplicate_is_free_when_it_is_let_go():
    allocator, index = make()
    keys = index.keys(range(12))
    older, younger = allocator.allocate(2), allocator.allocate(3)
    index.insert(keys, older, 8)
    index.insert(keys, younger, 12)
    assert index.match(keys) == [*older, younger[2]]
    allocator.free(younger)
    allocator.free(older)
    assert allocator.cached_pages == 3
    assert sorted(index.take(keys, 12)) == sorted([*older, younger[2]])
    index.check()


def test_a_page_behind_a_gap_is_found_again_when_the_gap_is_filled():
    allocator, index = make()
    pages, keys = cache(allocator, index, list(range(12))), index.keys(range(12))
    index.forget(pages[1])
    assert index.match(keys) == pages[:1]
    again = allocator.allocate(2)
    index.insert(keys, again, 8)
    assert index.match(keys) == [pages[0], again[1], pages[2]]
    index.check()


@pytest.mark.parametrize("held", [True, False])
def test_a_forgotten_page_is_not_found(held):
    allocator, index = make()
    pages, keys = cache(allocator, index, list(range(8))), index.keys(range(8))
    taken = index.take(keys, 8) if held else []
    index.forget(pages[1])
    index.forget(pages[1])
    assert index.match(keys) == pages[:1]
    index.check()
    allocator.check(taken)
    assert allocator.cached_pages == (0 if held else 1)


def test_a_page_is_forgotten_by_its_key():
    allocator, index = make()
    tokens = list(range(12))
    pages, keys = cache(allocator, index, tokens), index.keys(tokens)
    index.forget_key(keys[1])
    index.forget_key(keys[1])
    assert index.match(keys) == pages[:1]
    index.check()
    allocator.check([])


def test_clear_forgets_everything_and_takes_nothing_away():
    allocator, index = make()
    cache(allocator, index, list(range(8)))
    keys, pages = index.keys(range(50, 58)), allocator.allocate(2)
    index.insert(keys, pages, 8)
    index.clear()
    assert len(index) == allocator.cached_pages == 0
    assert index.match(keys) == []
    index.check()
    allocator.check(pages)
    allocator.free(pages)
    assert allocator.cached_pages == 0


def test_what_contradicts_is_not_inserted():
    allocator, index = make()
    keys, other = index.keys(range(12)), index.keys(range(50, 62))
    pages = allocator.allocate(3)
    with pytest.raises(ValueError, match="tokens=16: 4 whole pages, but 3 keys and 3 pages"):
        index.insert(keys, pages, 16)
    with pytest.raises(ValueError, match="tokens=12: 3 whole pages, but 3 keys and 2 pages"):
        index.insert(keys, pages[:2], 12)
    with pytest.raises(ValueError, match=f"page={pages[0]}: known already to hold something else"):
        index.insert(keys, [pages[0], pages[1], pages[0]], 12)
    allocator.free(pages[2:])
    with pytest.raises(ValueError, match=f"page={pages[2]}: made known by 1, but held by 0"):
        index.insert(keys, pages, 12)
    assert len(index) == 0
    index.insert(keys, pages, 8)
    with pytest.raises(ValueError, match=f"page={pages[0]}: known already to hold something else"):
        index.insert(other, pages, 8)
    assert index.match(keys) == pages[:2]
    index.check()


def test_a_page_has_tokens():
    with pytest.raises(ValueError, match="page_size=0"):
        PrefixIndex(PageAllocator(4), 0)


# Random walks.


class Walk:
    """Sequences come and go over a small pool, beside lists that say what must be true of it.

    A prefix is named by its salt and its tokens, and `written` says which one's KV lies in a page.
    Which pages are evicted is foretold where no other order is given than the default one.
    """

    page_size = 2

    def __init__(self, seed: int, order: EvictionOrder | None = None) -> None:
        self.random = random.Random(seed)
        self.foretold = order is None
        self.allocator, self.index = make(self.random.randint(6, 24), self.page_size, order)
        self.sequences: list[Any] = []  # (salt, tokens, keys, pages)
        self.written: dict[int, Any] = {}
        self.known: dict[Any, int] = {}  # prefix -> page
        self.holders: Counter[int] = Counter()
        self.cached: list[int] = []  # in the order of their eviction
        self.seen: Counter[str] = Counter()

    def prefixes(self, salt, tokens):
        size = self.page_size
        return [(salt, *tokens[: stop * size]) for stop in range(1, len(tokens) // size + 1)]

    def findable(self, prefixes):
        pages = []
        for prefix in prefixes:
            if prefix not in self.known:
                break
            pages.append(self.known[prefix])
        return pages

    def allocate(self, count):
        free = self.allocator.total - len(self.cached) - len(self.holders)
        if count > free + len(self.cached):
            with pytest.raises(OutOfPages):
                self.allocator.allocate(count)
            self.seen["refused"] += 1
            return None
        pages = self.allocator.allocate(count)
        evicted = pages[count - max(0, count - free) :]
        if self.foretold:
            assert evicted == self.cached[: len(evicted)], "least recently used first"
        assert set(evicted) <= set(self.cached), "in use, or free"
        assert len(set(pages)) == count and not set(pages) & self.holders.keys()
        self.cached = [page for page in self.cached if page not in evicted]
        self.known = {prefix: page for prefix, page in self.known.items() if page not in evicted}
        self.holders.update(pages)
        self.seen["evicted"] += len(evicted)
        return pages

    def share(self, pages):
        self.seen["revived"] += len(set(pages) & set(self.cached))
        self.cached = [page for page in self.cached if page not in pages]
        self.holders.update(pages)

    def free(self, pages):
        self.allocator.free(pages)
        known, gone = set(self.known.values()), []
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                del self.holders[page]
                gone.append(page)
        self.cached += [page for page in reversed(gone) if page in known]

    def arrive(self):
        """Take what is known, allocate the rest, and write it."""
        salt = self.random.choice([b"", b"", b"x"])
        tokens = [self.random.choice([0, 0, 0, 1]) for _ in range(self.random.randint(1, 16))]
        keys, prefixes = self.index.keys(tokens, salt), self.prefixes(salt, tokens)
        assert self.index.match(keys) == self.findable(prefixes)
        taken = self.index.take(keys, len(tokens) - 1)
        assert taken == self.findable(prefixes)[: (len(tokens) - 1) // self.page_size]
        assert [self.written[page] for page in taken] == prefixes[: len(taken)], "wrong KV"
        self.share(taken)
        self.seen["hits"] += len(taken)
        rest = self.allocate(-(-len(tokens) // self.page_size) - len(taken))
        if rest is None:
            self.free(taken)
            return
        self.written.update(dict.fromkeys(rest, "part of a page"))
        self.written.update(zip(rest, prefixes[len(taken) :], strict=False))
        self.sequences.append((salt, tokens, keys, taken + rest))

    def insert(self):
        """Make a part of somebody findable."""
        salt, tokens, keys, pages = self.random.choice(self.sequences)
        count = self.random.randint(0, len(tokens))
        self.index.insert(keys, pages, count)
        for prefix, page in zip(self.prefixes(salt, tokens[:count]), pages, strict=False):
            self.seen["duplicates"] += self.known.setdefault(prefix, page) != page

    def fork(self):
        """One more holder of all that somebody has."""
        sequence = self.random.choice(self.sequences)
        self.allocator.share(sequence[3])
        self.share(sequence[3])
        self.sequences.append(sequence)

    def leave(self):
        """Let go of everything at once."""
        sequence = self.sequences.pop(self.random.randrange(len(self.sequences)))
        self.free(sequence[3])

    def forget(self):
        """A page turns out not to hold what it was said to."""
        page = self.random.randint(1, self.allocator.total)
        self.index.forget(page)
        self.known = {prefix: other for prefix, other in self.known.items() if other != page}
        self.cached = [other for other in self.cached if other != page]

    def clear(self):
        """All are forgotten."""
        self.index.clear()
        self.known, self.cached = {}, []

    def step(self):
        """Do one thing, then compare everything."""
        steps, weights = [self.arrive, self.forget, self.clear], [40, 2, 0.3]
        if self.sequences:
            steps += [self.insert, self.leave, self.fork]
            weights += [40, 35, 3]
        self.random.choices(steps, weights)[0]()
        allocator = self.allocator
        allocator.check(page for sequence in self.sequences for page in sequence[3])
        self.index.check()
        assert allocator.known == set(self.known.values())
        assert (allocator.cached_pages, allocator.used_pages, allocator.free_pages) == (
            len(self.cached),
            len(self.holders),
            allocator.total - len(self.holders),
        )


def test_random_walks():
    seen: Counter[str] = Counter()
    for seed in range(40):
        walk = Walk(seed)
        for _ in range(300):
            walk.step()
        seen += walk.seen
        while walk.sequences:
            walk.leave()
        walk.allocator.check([])
        assert walk.allocate(walk.allocator.total) is not None, "all can be had again"
        assert len(walk.index) == 0
    for what in ("hits", "revived", "evicted", "refused", "duplicates"):
        assert seen[what] > 100, f"hardly walked through: {seen}"
