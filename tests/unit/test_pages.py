import pytest

from pdjax.host.pages import OutOfPages, PageAllocator
from pdjax.kv_layout import NULL_PAGE

pytestmark = pytest.mark.smoke


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
