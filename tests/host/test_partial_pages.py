"""Pages that begin with a sequence's tokens and go on differently: the beginning is copied, no page
that somebody else may read is written, and only what is new is computed."""

from dataclasses import replace

import pytest

from pdjax.config import KVConfig
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.partial_pages import PartialPages
from pdjax.host.sequences.sequence import State
from tests.helpers.deployment import CONFIG, Deployment, deploy

KEPT = replace(CONFIG, kv=KVConfig(prefix_cache=True))
BEFORE = b"the page before"


def made() -> tuple[PageAllocator, PartialPages]:
    allocator = PageAllocator(20)
    return allocator, PartialPages(allocator)


def test_the_page_with_the_longest_beginning_is_found():
    allocator, pages = made()
    [a, b, c] = allocator.allocate(3)
    pages.add_tail(BEFORE, a, [1, 2], 0)
    pages.add_tail(BEFORE, b, [1, 2, 3], 0)
    pages.add_tail(b"another", c, [1, 2, 3, 4], 0)
    for wanted, expected in (
        ([1, 2, 3, 4], (b, 3)),
        ([1, 2, 9], (a, 2)),
        ([1], (a, 1)),
        ([2, 2], (0, 0)),
        ([], (0, 0)),
    ):
        assert pages.find(BEFORE, wanted) == expected
    pages.check()
    assert pages.tails == {a, b, c} == allocator.known


def test_a_tail_that_another_page_begins_with_is_needless():
    allocator, pages = made()
    [a, b] = allocator.allocate(2)
    pages.add_tail(BEFORE, a, [1, 2, 3], 0)
    pages.add_tail(BEFORE, b, [1, 2], 0)
    assert pages.tails == {a}


def test_an_evicted_page_is_not_found():
    allocator, pages = made()
    [a] = allocator.allocate(1)
    pages.add_tail(BEFORE, a, [1, 2], 0)
    allocator.free([a])
    assert allocator.cached_pages == 1
    pages.use(a)
    assert allocator.cached_pages == 1
    allocator.allocate(allocator.free_pages)
    assert pages.find(BEFORE, [1, 2]) == (0, 0) and not pages.tails
    pages.check()


def test_few_pages_that_are_alike_are_looked_at():
    allocator, pages = made()
    for number, page in enumerate(allocator.allocate(12)):
        pages.add_tail(BEFORE, page, [1, 50 + number], 0)
    pages.check()
    assert pages.find(BEFORE, [1, 61])[1] == 2, "the newest"
    assert pages.find(BEFORE, [1, 50])[1] == 1, "one of the oldest: what it has in common"


def computed(deployment: Deployment, name: str, prompt: tuple[int, ...], **params: int) -> int:
    """The tokens of a prompt that are computed, of a request that is served to its end."""
    sequence = deployment.submit(name, prompt=prompt, **params)
    deployment.run()
    assert sequence.finish_reason == "length" and sequence.copied is None
    return len(prompt) - sequence.cached_tokens


PROMPT = (1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 6, 5, 7)


@pytest.mark.parametrize(
    ("prompt", "new"),
    [
        (PROMPT, 1),  # all but the last token, whose logits are wanted
        (PROMPT[:13], 1),
        (PROMPT[:12], 1),  # the third page is whole
        (PROMPT[:10], 1),
        ((*PROMPT[:10], 7, 7, 7), 3),  # it goes on differently
        ((*PROMPT, 1, 1), 2),  # what lies behind the prompt there is of the answer
        ((7, *PROMPT[1:]), 14),
        (PROMPT[:2], 1),  # of the first page
    ],
)
def test_only_what_is_new_is_computed(prompt: tuple[int, ...], new: int):
    deployment = deploy(KEPT)
    assert computed(deployment, "first", PROMPT) == len(PROMPT)
    assert computed(deployment, "second", prompt) == new
    assert computed(deployment, "third", PROMPT) == 1, "what was copied is as it was"
    [pool] = {each.pool for each in map(deployment.state, deployment.prefill)}
    assert pool.prefixes is not None
    totals = pool.prefixes.totals
    assert totals.looked_up == 2 * len(PROMPT) + len(prompt)
    assert totals.hit == len(PROMPT) - 1 + len(prompt) - new
    parts = totals.hit, totals.evicted, totals.isolated, totals.never_seen, totals.partial
    assert sum(parts) == totals.looked_up and 0 < totals.copied <= totals.hit


def test_a_page_is_not_copied_where_prefixes_are_not_kept():
    deployment = deploy(CONFIG)
    for name in "ab":
        assert computed(deployment, name, PROMPT) == len(PROMPT)


def test_another_salt_copies_nothing():
    deployment = deploy(KEPT)
    assert computed(deployment, "first", PROMPT[:3]) == 3
    request = deployment.submit("second", prompt=PROMPT[:3]).request
    deployment.run()
    salted = replace(request, id="third", cache_salt="another")
    [sequence] = deployment.coordinator.submit(salted)
    deployment.run()
    assert sequence.cached_tokens == 0


def test_a_prefill_that_is_broken_off_leaves_nothing():
    """A sequence that starts over has output, and for a time no KV of it."""
    deployment = deploy(KEPT)
    sequence = deployment.submit("a", prompt=PROMPT, max_tokens=9)
    index = deployment.state(deployment.prefill[0]).pool.prefixes
    assert index is not None
    deployment.run_until(lambda: len(sequence.output) > 2)
    deployment.coordinator.loop.lifecycle.preempt(sequence)
    index.clear()
    deployment.run_until(lambda: sequence.state is State.PREFILLING)
    deployment.coordinator.abort("a")
    deployment.run()
    assert not deployment.state(deployment.prefill[0]).allocator.known & index._partial.tails


def test_a_turn_finds_the_end_of_the_one_before():
    """One engine for both phases: the answer's own KV is where the next turn is prefilled."""
    deployment = deploy(KEPT, colocated=True)
    first = deployment.submit("first", prompt=PROMPT[:6], max_tokens=3)
    deployment.run()
    said = (*PROMPT[:6], *first.output)  # 9 tokens, of which the last has no KV
    assert computed(deployment, "second", (*said, 5, 6)) == 3


def test_a_tail_that_becomes_a_whole_page_is_known_once():
    allocator, pages = made()
    [a] = allocator.allocate(1)
    pages.add_tail(BEFORE, a, [1, 2], 0)
    pages.add([(BEFORE, a, 0)], [1, 2, 3, 4], 4)
    pages.check()
    assert not pages.tails and pages.find(BEFORE, [1, 2, 3, 9]) == (a, 3)
    pages.drop([a])
    assert pages.find(BEFORE, [1, 2]) == (0, 0)
