"""Every bucket once through the door, so that no request waits for a compilation.

First all of them are compiled, for which engines take the cores that there are. Then each runs
once: that it runs is known before the first request, and its memory has been touched.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import permutations, product

from pdjax.config import Config, HandoffConfig
from pdjax.host.batching.prefill_batch import empty_prefill_batch, history
from pdjax.host.engines import EngineState
from pdjax.host.fleet import Fleet
from pdjax.host.handoff.handoff import whole
from pdjax.host.handoff.spans import Spans
from pdjax.host.kv.pools import PoolState
from pdjax.host.metrics.recorder import Recorder
from pdjax.interfaces.batches import Array
from pdjax.interfaces.engine import Engine
from pdjax.interfaces.steps import DecodeStep, MixedStep, PrefillStep, Step
from pdjax.interfaces.transport import TransferJob, Transport

_MOST_PROBED = 1 << 28
"""Bytes that a link is measured with at the most: the pools leave little memory free."""

_WARM_UP_JOB = -1
"""Id of a job that no hand-off waits for; one at a time."""

WarmUp = Callable[[], None]
"""Waits until the programs of one shape are compiled; or sends one batch of nothing but padding,
and waits for it: it touches null pages alone."""

Show = Callable[[list[WarmUp], str], Iterable[WarmUp]]
"""Goes through what there is to do, and may show how far it has come with what a few words say."""


def warm_ups(
    fleet: Fleet,
    transport: Transport,
    spans_of: Callable[[PoolState, PoolState], Spans],
    config: Config,
    context: int,
    recorder: Recorder,
    tiers: Iterable[tuple[PoolState, PoolState, Iterable[int]]] = (),
) -> tuple[list[WarmUp], list[WarmUp]]:
    """Lets engines begin to compile what batches of every shape need that may come. Returns the
    ends of that, and then such a batch of each, and a look at each link; all to be called in order.
    An engine that is closed compiles nothing more.

    Args:
      spans_of: the spans between two pools.
      context: tokens of the longest sequence.
      tiers: between which pools whole pages move besides, and the spans of each move.
    """
    compiling: list[WarmUp] = []
    running: list[WarmUp] = []
    for state in fleet:
        for step in _steps(state):
            compiling.append(state.engine.compile(step).result)
            running.append(partial(_step, state.engine, step))
        if state.pipeline is not None:
            running.append(partial(state.engine.set_history, 0, history((), state.buckets)))
    for (source, target), groups in _links(fleet, config.handoff).items():
        spans, checked = spans_of(source, target), config.handoff.checksums
        for size, layers in product(spans.buckets, sorted(groups, key=lambda run: run.start)):
            move = _padding(source, target, layers, size, spans, checked)
            compiling.append(transport.compile(*move).result)
            running.append(partial(_move, transport, *move))
        running.append(partial(_measure, transport, source, target, context, recorder))
    for source, target, sizes in tiers:
        layers = range(source.layout.num_layers)
        for size in sizes:
            spans = spans_of(source, target)
            move = _padding(source, target, layers, size, spans, checked=False)
            compiling.append(transport.compile(*move).result)
            running.append(partial(_move, transport, *move))
    return compiling, [*running, *_feeds(fleet, transport)]


def _feeds(fleet: Fleet, transport: Transport) -> Iterator[WarmUp]:
    """A row of each engine that decodes, fed once: the tokens of all that prefill have one
    shape."""
    for target in fleet.decode:
        for source in fleet.prefill:
            ends = source.pool.id, target.pool.id
            if transport.connects(*ends) and transport.writes_ahead(*ends):
                yield partial(_feed, source, target)
                break


def _steps(state: EngineState) -> Iterator[Step]:
    """Every step that an engine may be given."""
    buckets = state.buckets
    shapes = list(buckets.prefill_shapes())
    for shape in shapes:
        yield PrefillStep(empty_prefill_batch(buckets, *shape))
    # A history is for the choice of the next token, which does not see the step's shape.
    if shapes:
        yield PrefillStep(empty_prefill_batch(buckets, *shapes[0], history=True))
    if state.pipeline is not None:
        for rows, pages in state.pipeline.shapes():
            yield DecodeStep(state.rows.idle_tick(rows, pages))
        for chunks, tick in product(buckets.mixed_chunks(), state.pipeline.mixed_shapes()):
            yield MixedStep(empty_prefill_batch(buckets, *chunks), state.rows.idle_tick(*tick))


def _links(fleet: Fleet, handoff: HandoffConfig) -> dict[tuple[PoolState, PoolState], set[range]]:
    """Between which pools KV may move, and which layers together."""
    links: dict[tuple[PoolState, PoolState], set[range]] = {}

    def add(source: EngineState, target: EngineState, groups: tuple[range, ...]) -> None:
        if source.pool is not target.pool and source.pool.id in target.sources:
            links.setdefault((source.pool, target.pool), set()).update(groups)

    for source, target in product(fleet.prefill, fleet.decode):
        add(source, target, (*source.engine.layer_groups, *whole(source.pool)))
        if handoff.give_back:
            add(target, source, whole(target.pool))
    if handoff.rebalance:
        for source, target in permutations(fleet.decode, 2):
            add(source, target, whole(source.pool))
    return links


def _step(engine: Engine, step: Step) -> None:
    engine.submit(step).result()


def _feed(source: EngineState, target: EngineState) -> None:
    shape = next(iter(source.buckets.prefill_shapes()))
    step = source.engine.submit(PrefillStep(empty_prefill_batch(source.buckets, *shape)))
    step.result()
    target.engine.feed(0, step, 0)


def _padding(
    source: PoolState, target: PoolState, layers: range, size: int, spans: Spans, checked: bool
) -> tuple[TransferJob, Array]:
    """A job of null pages, and those that it is written to."""
    no_pages: list[tuple[list[int], range]] = [([], range(size))]
    from_, to = (spans.pages(no_pages, pool.layout.page_size) for pool in (source, target))
    return TransferJob(_WARM_UP_JOB, source.id, target.id, layers, from_, 0, checked), to


def _move(transport: Transport, job: TransferJob, to: Array) -> None:
    transport.send(job).result()
    transport.write(job.id, to).result()


def _measure(
    transport: Transport, source: PoolState, target: PoolState, context: int, recorder: Recorder
) -> None:
    """Measure a link by as many bytes as the longest context has on one pair of devices; all pairs
    together carry as much more as there are."""
    here, there = source.layout, target.layout
    pairs = min(here.stages * here.tp, there.stages * there.tp)
    nbytes = min(-(-here.page_bytes * here.pages_for(context) // pairs), _MOST_PROBED)
    seconds = transport.measure(source.id, target.id, nbytes).result()
    recorder.link(source.id, target.id).peak = pairs * nbytes / seconds
