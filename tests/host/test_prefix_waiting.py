"""What it costs to ask, at every step, how much of a waiting prompt is cached."""

from pdjax.core.request import Request, SamplingParams
from pdjax.host.sequences.sequence import Sequence
from tests.host.test_prefix_index import PAGE_SIZE, cache, make


class CountedLookups(dict):
    """A table that counts how often it is asked."""

    asked = 0

    def __contains__(self, key):
        self.asked += 1
        return super().__contains__(key)


def test_a_sequence_that_waits_is_walked_once_and_then_from_where_the_walk_ended():
    allocator, index = make(num_pages=200)
    tokens = tuple(range(400))
    sequence = Sequence(Request("r", tokens, SamplingParams(), 0.0), 0, 0)
    assert index.known_tokens(sequence, 399) == 0
    pages = cache(allocator, index, tokens[:360])
    assert index.known_tokens(sequence, 399) == 360
    index._pages = table = CountedLookups(index._pages)
    for _ in range(50):
        assert index.known_tokens(sequence, 399) == 360
        assert index.known_tokens(sequence, 10) == 8
    assert table.asked == 100
    index.forget(pages[30])
    assert index.known_tokens(sequence, 399) == 30 * PAGE_SIZE
    index.clear()
    assert index.known_tokens(sequence, 399) == 0
