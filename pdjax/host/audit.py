"""The account of pages and rows: every one is free, or held by exactly the sequences and hand-offs
that are known."""

from collections.abc import Sequence as Seq

from pdjax.host.engines import DecodeLane, Lane, PrefillLane
from pdjax.host.handoff.manager import Handoffs
from pdjax.host.sequences.lifecycle import Roster


def audit(
    prefill: Seq[PrefillLane], decode: Seq[DecodeLane], roster: Roster, handoffs: Handoffs
) -> None:
    """Assert it, of every pool, index and batch.

    Raises:
      AssertionError: something was lost, or its holder is not known.
    """
    held = roster.pages_held()
    for handoff in handoffs.open:
        for holder, pages in handoff.held():
            held[holder.allocator] += pages
    for allocator, pages in held.items():
        allocator.check(pages)
    lanes: list[Lane] = [*prefill, *decode]
    for pool in {id(lane.pool): lane.pool for lane in lanes}.values():
        if pool.prefixes is not None:
            pool.prefixes.check()
    for lane in decode:
        coming = sum(h.target is lane and h.row >= 0 for h in handoffs.open)
        taken = lane.pipeline.taken_rows
        assert taken == len(lane.sequences) + coming, f"decode/{lane.index}: rows leaked"
