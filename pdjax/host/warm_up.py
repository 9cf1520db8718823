"""Every bucket once through the door, so that no request waits for a compilation."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from functools import partial
from itertools import permutations, product

from pdjax.config import HandoffConfig
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.decode_pipeline import Pipeline
from pdjax.host.batching.prefill_batch import empty_prefill_batch, history
from pdjax.host.engines import DecodeLane, Lane, PrefillLane
from pdjax.host.handoff.handoff import groups_of
from pdjax.host.handoff.spans import span_pages
from pdjax.host.metrics.recorder import Recorder
from pdjax.interfaces.batches import PrefillBatch
from pdjax.interfaces.engine import DecodeEngine, PrefillEngine
from pdjax.interfaces.transfer import Shipment, Transfer

_MOST_PROBED = 1 << 28
"""Bytes that a link is measured with at the most: the pools leave little memory free."""

WarmUp = Callable[[], None]
"""Sends one batch of nothing but padding, and waits for it; it touches null pages alone."""


def warm_ups(
    prefill: Seq[PrefillLane],
    decode: Seq[DecodeLane],
    transfer: Transfer,
    buckets: Buckets,
    handoff: HandoffConfig,
    recorder: Recorder,
) -> list[WarmUp]:
    """A batch of every shape there is, and a look at each link; one after another, memory holds no
    more than one."""
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
    for ends in _pairs(prefill, decode, handoff):
        groups = groups_of(ends[0])
        layers = {*groups, range(groups[0].start, groups[-1].stop)}
        for size, run in product(buckets.handoff_spans, sorted(layers, key=lambda run: run.start)):
            todo.append(partial(_hand_off, transfer, *ends, run, size, buckets, handoff.checksums))
        todo.append(partial(_probe, transfer, *ends, buckets, recorder))
    return todo


def _pairs(
    prefill: Seq[PrefillLane], decode: Seq[DecodeLane], handoff: HandoffConfig
) -> Iterator[tuple[Lane, Lane]]:
    """Between whom KV may move."""
    for source, target in product(prefill, decode):
        if not target.shares_with:
            yield source, target
            if handoff.give_back:
                yield target, source
    if handoff.rebalance:
        yield from permutations(decode, 2)


def _prefill(engine: PrefillEngine, batch: PrefillBatch) -> None:
    engine.prefill(batch).result()


def _tick(engine: DecodeEngine, pipeline: Pipeline, pages: int) -> None:
    engine.tick(pipeline.idle_tick(pages)).result()


def _hand_off(
    transfer: Transfer,
    source: Lane,
    target: Lane,
    layers: range,
    spans: int,
    buckets: Buckets,
    checked: bool,
) -> None:
    nobody: list[tuple[list[int], range]] = [([], range(spans))]
    from_, to = (
        span_pages(nobody, lane.engine.layout.page_size, buckets) for lane in (source, target)
    )
    ticket = transfer.send(Shipment(source.end, target.end, layers, from_, 0, checked))
    ticket.result()
    transfer.land(ticket, to).result()


def _probe(
    transfer: Transfer, source: Lane, target: Lane, buckets: Buckets, recorder: Recorder
) -> None:
    """Measure the link by as many bytes as the longest context has on one pair of devices; all
    pairs together carry as much more as there are."""
    here, there = (lane.engine.layout for lane in (source, target))
    pairs = min(here.stages * here.tp, there.stages * there.tp)
    whole = here.page_bytes * here.pages_for(buckets.context)
    nbytes = min(-(-whole // pairs), _MOST_PROBED)
    seconds = transfer.probe(source.end, target.end, nbytes)
    recorder.link(source.end, target.end).peak = pairs * nbytes / seconds
