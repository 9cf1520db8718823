"""The account of pages and rows: every one is free, or held by exactly the sequences, hand-offs and
moves from and to tiers that are known."""

from pdjax.host.fleet import Fleet
from pdjax.host.handoff.manager import HandoffManager
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.tiers.manager import TierManager


def audit(
    fleet: Fleet, lifecycle: SequenceLifecycle, handoffs: HandoffManager, tiers: TierManager
) -> None:
    """Assert it, of every pool, index and batch.

    Raises:
      AssertionError: something was lost, or its holder is not known.
    """
    for pool in fleet.pools.values():
        held = [page for sequence in lifecycle.holders(pool) for page in sequence.pages]
        for handoff in handoffs.open:
            for holder, pages in handoff.held():
                if holder is pool:
                    held += pages
        held += () if pool.pins is None else pool.pins.held()
        held += [page for holder, pages in tiers.held() if holder is pool for page in pages]
        pool.allocator.check(held)
        leaving = [each for each in handoffs.open if each.source is pool]
        expected = sum(len(handoff.source_pages) for handoff in leaving)
        assert pool.leaving == expected, f"{pool.id}: pages that leave were miscounted"
        if pool.prefixes is not None:
            pool.prefixes.check()
    for move in tiers.moves.under_way:
        wanted = move.asker is None or not move.asker.closed
        assert wanted or move.writing is not None, f"job {move.job.id}: its load holds no pages"
    for state in fleet.decode:
        coming = sum(handoff.engine is state for handoff in handoffs.open)
        taken = state.rows.taken_rows
        assert taken == len(state.decoding) + coming, f"{state.id}: rows leaked"
