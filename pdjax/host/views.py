"""What the schedulers see of the engines."""

from collections.abc import Iterable

from pdjax.host.engines import DecodeLane, PrefillLane
from pdjax.host.policies.api import DecodeView, PrefillView
from pdjax.host.sequences.sequence import Sequence


def prefill_view(lane: PrefillLane, decode: Iterable[DecodeLane], lookahead: int) -> PrefillView:
    """A prefill engine that takes `lookahead` steps beyond the one that runs."""
    # In a shared pool, a page in hand for everybody who decodes: see FcfsDecode.
    in_hand = sum(each.pipeline.taken_rows for each in decode if lane.index in each.shares_with)

    def cached(sequence: Sequence) -> int:
        prefixes = lane.pool.prefixes
        if prefixes is None:
            return 0
        # The last token is computed anew: its logits are wanted.
        return prefixes.known_tokens(sequence, sequence.length - 1)

    return PrefillView(
        engine=lane.index,
        open=len(lane.in_flight) <= lookahead,
        running=tuple(seq for seq in lane.running if seq.prefilled < seq.length),
        backlog=lane.backlog,
        free_pages=max(0, lane.allocator.free_pages - in_hand),
        total_pages=lane.allocator.total,
        cached=cached,
        steps=lane.steps,
    )


def decode_view(lane: DecodeLane) -> DecodeView:
    """A decode engine."""
    return DecodeView(
        engine=lane.index,
        rows=lane.pipeline.rows,
        free_rows=lane.pipeline.rows - lane.pipeline.taken_rows,
        free_pages=lane.allocator.free_pages,
        total_pages=lane.allocator.total,
        shares_with=lane.shares_with,
    )
