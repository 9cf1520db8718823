"""What follows when pages hold nothing any longer: a whole pool that its engine has lost, or pages
that had landed and were not written after all."""

from collections.abc import Iterable

from pdjax.host.engines import Lane
from pdjax.host.handoff.handoff import Handoff, Purpose
from pdjax.host.sequences.lifecycle import Roster
from pdjax.host.sequences.sequence import State


def lose_pool(lane: Lane, roster: Roster, handoffs: Iterable[Handoff]) -> None:
    """Preempt every sequence that has KV in a lane's pool, and forget the pool's prefixes.

    Args:
      handoffs: the open ones. None of them reads the pool or fills it any more: the sequence of
        one that has departed is preempted; of one that has not, its own pages decide.
    """
    allocator = lane.allocator
    for handoff in handoffs:
        if allocator not in (handoff.source.allocator, handoff.target.allocator):
            continue
        if handoff.purpose is Purpose.CACHE:
            handoff.close()
        elif handoff.departed is None:
            handoff.withdraw()
        else:
            roster.preempt(handoff.sequence, sound=False)
    for sequence in roster.holding(allocator):
        roster.preempt(sequence, sound=False)
    if lane.pool.prefixes is not None:
        lane.pool.prefixes.clear()


def lose_pages(
    lane: Lane, lost: set[int], error: BaseException, roster: Roster, handoffs: Iterable[Handoff]
) -> None:
    """End the sequences that have found pages in a lane's pool that hold nothing; one that has
    shown no token yet begins anew. The prefix index forgets those pages, and what was computed
    from them.

    Args:
      handoffs: the open ones. One whose target had such pages sends them, too.
    """
    prefixes = lane.pool.prefixes
    assert prefixes is not None, "pages are found by an index"
    for page in lost:
        prefixes.forget(page)
    for sequence in roster.holding(lane.allocator, lost):
        first = next(i for i, page in enumerate(sequence.pages) if page in lost)
        for page in sequence.pages[first:]:
            prefixes.forget(page)
        if sequence.state is State.PREFILLING:
            roster.preempt(sequence)
        else:
            roster.fail(sequence, error)
    for handoff in handoffs:
        source, target = handoff.source.allocator, handoff.target.allocator
        if target is lane.allocator and not lost.isdisjoint(handoff.target_pages):
            handoff.skip_nothing()
        if source is lane.allocator and not lost.isdisjoint(handoff.pages):
            if handoff.purpose is Purpose.CACHE:
                handoff.close()
            else:
                roster.fail(handoff.sequence, error)
