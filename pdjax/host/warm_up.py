"""Every bucket once through the door, so that no request waits for a compilation."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

from pdjax.engine_api import DecodeEngine, PrefillBatch, PrefillEngine, Transfer
from pdjax.host.batch import Buckets, empty_prefill_batch, handoff_pages, history
from pdjax.host.lanes import DecodeLane, PrefillLane
from pdjax.host.pipeline import Pipeline
from pdjax.kv_layout import NULL_PAGE

WarmUp = Callable[[], None]
"""Sends one batch of nothing but padding, and waits for it; it touches null pages alone."""


def warm_ups(
    prefill: Seq[PrefillLane], decode: Seq[DecodeLane], transfer: Transfer, buckets: Buckets
) -> list[WarmUp]:
    """A batch of every shape there is; one after another, memory holds no more than one."""
    todo: list[WarmUp] = []
    for lane in prefill:
        shapes = list(buckets.prefill_shapes())
        batches = [empty_prefill_batch(buckets, *shape) for shape in shapes]
        # A history is for the choice of the next token, which does not see the step's shape.
        batches.append(empty_prefill_batch(buckets, *shapes[0], history=True))
        todo += [partial(_prefill, lane.engine, batch) for batch in batches]
    for target in decode:
        for pages in buckets.table_pages:
            todo.append(partial(_tick, target.engine, target.pipeline, pages))
        todo.append(partial(target.engine.remember, 0, history((), buckets)))
        for source in prefill if not target.shares_with else ():
            for pages in buckets.handoff_pages:
                todo.append(
                    partial(_hand_off, transfer, source.index, target.index, pages, buckets)
                )
    return todo


def _prefill(engine: PrefillEngine, batch: PrefillBatch) -> None:
    engine.prefill(batch).result()


def _tick(engine: DecodeEngine, pipeline: Pipeline, pages: int) -> None:
    engine.tick(pipeline.idle_tick(pages)).result()


def _hand_off(transfer: Transfer, source: int, target: int, pages: int, buckets: Buckets) -> None:
    nothing = [NULL_PAGE] * pages
    from_, to = handoff_pages(nothing, buckets), handoff_pages(nothing, buckets)
    ticket = transfer.start(source, target, from_, to, 0)
    ticket.result()
    transfer.land(ticket)
