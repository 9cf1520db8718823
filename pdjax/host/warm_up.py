"""Every bucket once through the door, so that no request waits for a compilation."""

from collections.abc import Sequence as Seq

from pdjax.engine_api import Transfer
from pdjax.host.batch import Buckets, empty_prefill_batch, handoff_pages, history
from pdjax.host.lanes import DecodeLane, PrefillLane
from pdjax.kv_layout import NULL_PAGE


def warm_up(
    prefill: Seq[PrefillLane], decode: Seq[DecodeLane], transfer: Transfer, buckets: Buckets
) -> int:
    """Dispatch batches of nothing but padding, of every shape; they touch null pages alone.

    Waits for each one, so that memory holds no more than one at a time.

    Returns:
      how many there were.
    """
    done = 0
    for lane in prefill:
        shapes = list(buckets.prefill_shapes())
        batches = [empty_prefill_batch(buckets, *shape) for shape in shapes]
        # A history is for the choice of the next token, which does not see the step's shape.
        batches.append(empty_prefill_batch(buckets, *shapes[0], history=True))
        for batch in batches:
            lane.engine.prefill(batch).result()
        done += len(batches)
    for target in decode:
        for pages in buckets.table_pages:
            target.engine.tick(target.pipeline.idle_tick(pages)).result()
        target.engine.remember(0, history((), buckets))
        done += len(buckets.table_pages) + 1
        for source in prefill if not target.shares_with else ():
            for pages in buckets.handoff_pages:
                nothing = [NULL_PAGE] * pages
                ticket = transfer.start(
                    source.index,
                    target.index,
                    handoff_pages(nothing, buckets),
                    handoff_pages(nothing, buckets),
                    0,
                )
                ticket.result()
                transfer.land(ticket)
                done += 1
    return done
