"""What follows when pages hold nothing any longer: a whole pool that its engines have lost, or
pages that counted as written and were not."""

from collections.abc import Iterable

from pdjax.host.handoff.handoff import Handoff, Purpose
from pdjax.host.kv.pools import PoolState
from pdjax.host.kv.prefix_index import keys_of
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.sequence import State


def lose_pool(pool: PoolState, lifecycle: SequenceLifecycle, handoffs: Iterable[Handoff]) -> None:
    """Preempt every sequence that has KV in a lost pool, and forget the pool's prefixes,
    pinned ones, too.

    Args:
      handoffs: the open ones. None of them reads the pool or fills it any more: the sequence of
        one that has departed, or whose row runs ahead, is preempted; of any other its own pages
        decide.
    """
    for handoff in handoffs:
        if pool not in (handoff.source, handoff.target):
            continue
        if handoff.purpose is Purpose.CACHE:
            handoff.close()
        elif handoff.departed is None and not handoff.ahead:
            handoff.withdraw()
        else:
            lifecycle.preempt(handoff.sequence, sound=False)
    for sequence in lifecycle.holders(pool):
        lifecycle.preempt(sequence, sound=False)
    if pool.pins is not None:
        pool.pins.clear()
    if pool.prefixes is not None:
        pool.prefixes.clear()


def lose_written(
    handoff: Handoff,
    error: BaseException,
    lifecycle: SequenceLifecycle,
    handoffs: Iterable[Handoff],
) -> None:
    """What a hand-off had counted as written was not. The prefix index of its target forgets that,
    also where it has been evicted since and lies in a tier; `lose_pages`.

    Args:
      handoffs: the open ones.
    """
    pool, sequence = handoff.target, handoff.sequence
    if (prefixes := pool.prefixes) is None:
        return
    keys = keys_of(sequence, prefixes)
    found = prefixes.match(keys)
    for key in keys[len(found) :]:
        prefixes.forget_key(key)
    # Pages that were not given away since; of tails that cannot be told.
    lost = set(found).intersection(handoff.target_pages)
    lost |= prefixes.tails_among(handoff.target_pages)
    lose_pages(pool, lost, error, lifecycle, handoffs)


def lose_pages(
    pool: PoolState,
    lost: set[int],
    error: BaseException,
    lifecycle: SequenceLifecycle,
    handoffs: Iterable[Handoff],
) -> None:
    """End the sequences that have found pages in a pool that hold nothing; one that has shown no
    token yet starts over. The prefix index forgets those pages, and what was computed from them.

    Args:
      handoffs: the open ones. One whose target had such pages sends them, too.
    """
    prefixes = pool.prefixes
    assert prefixes is not None, "pages are found by an index"
    for page in lost:
        prefixes.forget(page)
    for sequence in lifecycle.holding(pool, lost):
        # Of one that copied a page, all that it began with is forgotten.
        first = next((i for i, page in enumerate(sequence.pages) if page in lost), 0)
        for page in sequence.pages[first:]:
            prefixes.forget(page)
        if sequence.state is State.PREFILLING:
            lifecycle.preempt(sequence)
        else:
            lifecycle.fail(sequence, error)
    for handoff in handoffs:
        if handoff.target is pool and not lost.isdisjoint(handoff.target_pages):
            handoff.skip_nothing()
        if handoff.source is pool and not lost.isdisjoint(handoff.pages):
            if handoff.purpose is Purpose.CACHE:
                handoff.close()
            else:
                lifecycle.fail(handoff.sequence, error)
