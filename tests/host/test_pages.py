from collections.abc import Callable
from collections.abc import Sequence as Seq

import pytest

from pdjax.core.kv_layout import NULL_PAGE
from pdjax.host.kv.pages import OutOfPages, PageAllocator


def places(pages: Seq[int]) -> dict[int, int]:
    """Of the pages of a sequence."""
    return {page: place for place, page in enumerate(pages)}


def test_every_page_but_the_null_page_is_handed_out_once():
    allocator = PageAllocator(9)
    pages = allocator.allocate(8)
    assert sorted(pages) == list(range(1, 9))
    assert NULL_PAGE not in pages
    assert (allocator.free_pages, allocator.used_pages, allocator.total) == (0, 8, 8)


def test_all_or_nothing():
    allocator = PageAllocator(4)
    allocator.allocate(2)
    with pytest.raises(OutOfPages, match="2 pages asked for, 1 of 3 are free"):
        allocator.allocate(2)
    assert allocator.free_pages == 1


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    allocator = PageAllocator(3)
    [page] = allocator.allocate(1)
    allocator.share([page])
    allocator.free([page])
    allocator.check([page])
    allocator.free([page])
    allocator.check([])
    with pytest.raises(ValueError, match="shared"):
        allocator.share([page])


@pytest.mark.parametrize("times", [1, 2])
def test_double_free_raises_and_frees_nothing(times):
    allocator = PageAllocator(4)
    first, second = allocator.allocate(2)
    if times == 1:
        allocator.free([first])
    with pytest.raises(ValueError, match=f"page={first}: freed by {times}"):
        allocator.free([second] + [first] * times)
    assert allocator.used_pages == times


@pytest.mark.parametrize("page", [NULL_PAGE, 99])
def test_what_was_never_handed_out_cannot_be_freed(page):
    with pytest.raises(ValueError, match=f"page={page}"):
        PageAllocator(4).free([page])


def test_check_names_leaks_and_uses_after_free():
    allocator = PageAllocator(5)
    held = allocator.allocate(2)
    allocator.check(held)
    with pytest.raises(AssertionError, match=rf"leaked pages \[{held[1]}\]"):
        allocator.check(held[:1])
    allocator.free(held[1:])
    with pytest.raises(AssertionError, match=rf"used after free \[{held[1]}\]"):
        allocator.check(held)


def test_a_pool_needs_a_page_besides_the_null_page():
    with pytest.raises(ValueError, match="num_pages=1"):
        PageAllocator(1)


def test_a_known_page_is_cached_when_its_last_holder_lets_go():
    allocator = PageAllocator(4)
    page, other = allocator.allocate(2)
    allocator.know(places([page]))
    allocator.share([page])
    allocator.free([page, other])
    assert allocator.cached_pages == 0, "it has a holder still"
    allocator.free([page])
    assert (allocator.free_pages, allocator.cached_pages, allocator.used_pages) == (3, 1, 0)
    allocator.check([])


def test_a_cached_page_is_revived_by_as_many_as_share_it():
    allocator = PageAllocator(4)
    [page] = allocator.allocate(1)
    allocator.know(places([page]))
    allocator.free([page])
    allocator.share([page, page])
    allocator.check([page, page])
    assert (allocator.free_pages, allocator.cached_pages, allocator.used_pages) == (2, 0, 1)
    allocator.free([page, page])
    assert allocator.cached_pages == 1


def test_sharing_does_not_go_through_the_whole_cache():
    class Lookup(set[int]):
        def __iter__(self):
            raise AssertionError("a cache may have many thousand pages")

    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    allocator.know(places(pages))
    allocator.free(pages)
    allocator._cached = Lookup(allocator._cached)
    allocator.share(pages[:1])
    assert (allocator.cached_pages, allocator.used_pages) == (1, 1)


def test_sharing_is_all_or_nothing():
    allocator = PageAllocator(4)
    cached, free = allocator.allocate(2)
    allocator.know(places([cached]))
    allocator.free([cached, free])
    with pytest.raises(ValueError, match=f"page={free}: shared by 1, but held by 0"):
        allocator.share([cached, free])
    assert allocator.cached_pages == 1
    allocator.check([])


def test_free_pages_go_before_cached_ones_and_tails_before_heads():
    allocator = PageAllocator(8)
    evicted: list[int] = []
    allocator.on_evict(evicted.extend)
    older, younger = allocator.allocate(3), allocator.allocate(3)
    allocator.know(places(older + younger))
    allocator.free(older)
    allocator.free(younger)
    [free] = allocator.allocate(1)
    assert free not in older + younger and not evicted
    assert [allocator.allocate(1)[0] for _ in range(6)] == older[::-1] + younger[::-1] == evicted
    with pytest.raises(OutOfPages, match="1 pages asked for, 0 of 7 are free"):
        allocator.allocate(1)
    assert not allocator.known


def test_what_was_used_again_is_evicted_last():
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    allocator.know(places(pages))
    allocator.free(pages)  # the last would be the first to go
    allocator.share(pages[2:])
    allocator.free(pages[2:])
    assert allocator.allocate(3) == [pages[1], pages[0], pages[2]]


def test_nothing_is_evicted_where_not_all_can_be_had():
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    allocator.know(places(pages))
    allocator.free(pages[:2])
    with pytest.raises(OutOfPages, match="3 pages asked for, 2 of 3 are free"):
        allocator.allocate(3)
    assert allocator.cached_pages == 2
    allocator.check(pages[2:])


def test_a_forgotten_page_is_free_once_it_has_no_holder():
    allocator = PageAllocator(4)
    held, cached, never_known = allocator.allocate(3)
    allocator.know(places([held, cached]))
    allocator.free([cached])
    allocator.forget([held, cached, never_known])
    assert (allocator.free_pages, allocator.cached_pages, allocator.used_pages) == (1, 0, 2)
    allocator.check([held, never_known])
    allocator.free([held, never_known])
    assert allocator.cached_pages == 0
    allocator.check([])


def test_only_a_page_with_a_holder_can_be_made_known():
    allocator = PageAllocator(4)
    held, gone = allocator.allocate(2)
    allocator.free([gone])
    with pytest.raises(ValueError, match=f"page={gone}: made known by 1, but held by 0"):
        allocator.know(places([held, gone]))
    assert not allocator.known


def test_check_notices_a_page_that_is_free_and_known():
    allocator = PageAllocator(4)
    allocator.known.add(1)
    with pytest.raises(AssertionError, match="free and known"):
        allocator.check([])


def test_every_listener_hears_of_all_evicted_pages_at_once_before_they_are_handed_out():
    allocator = PageAllocator(6)
    heard: list[tuple[str, list[int], int]] = []

    def listener(name: str) -> Callable[[Seq[int]], None]:
        return lambda pages: heard.append((name, list(pages), allocator.used_pages))

    for name in ("first", "second"):
        allocator.on_evict(listener(name))
    cached, held = allocator.allocate(3), allocator.allocate(1)
    allocator.know(places(cached))
    allocator.free(cached)
    assert allocator.allocate(1) and not heard  # a free page was left
    pages = allocator.allocate(2)
    assert pages == cached[:0:-1]
    assert heard == [("first", pages, 2), ("second", pages, 2)]
    allocator.allocate(1)
    assert heard[2:] == [("first", cached[:1], 4), ("second", cached[:1], 4)]
    assert held


def test_listeners_hear_of_each_change_when_it_has_been_made():
    allocator = PageAllocator(4)
    changes: list[tuple[int, int, int]] = []
    for _ in range(2):
        allocator.on_change(
            lambda: changes.append(
                (allocator.free_pages, allocator.cached_pages, allocator.used_pages)
            )
        )

    def change(call) -> tuple[int, int, int]:
        changes.clear()
        call()
        first, second = changes
        assert first == second
        return first

    pages: list[int] = []
    assert change(lambda: pages.extend(allocator.allocate(2))) == (1, 0, 2)
    assert change(lambda: allocator.share(pages)) == (1, 0, 2)
    allocator.know(places(pages))
    assert change(lambda: allocator.free(pages * 2)) == (3, 2, 0)
    assert change(lambda: allocator.share(pages[:1])) == (2, 1, 1)
    assert change(lambda: allocator.forget(pages)) == (2, 0, 1)
    changes.clear()
    with pytest.raises(OutOfPages):
        allocator.allocate(3)
    with pytest.raises(ValueError, match="freed"):
        allocator.free([3])
    assert not changes
