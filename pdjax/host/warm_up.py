"""Every bucket once through the door, so that no request waits for a compilation."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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
from pdjax.interfaces.engine import Engine
from pdjax.interfaces.steps import DecodeStep, PrefillStep, Step
from pdjax.interfaces.transport import TransferJob, Transport

_MOST_PROBED = 1 << 28
"""Bytes that a link is measured with at the most: the pools leave little memory free."""

_WARM_UP_JOB = -1
"""Id of a job that no hand-off waits for; one at a time."""

WarmUp = Callable[[], None]
"""Sends one batch of nothing but padding, and waits for it; it touches null pages alone."""


@contextmanager
def warm_ups(
    fleet: Fleet,
    transport: Transport,
    spans_of: Callable[[PoolState, PoolState], Spans],
    config: Config,
    context: int,
    recorder: Recorder,
) -> Iterator[list[WarmUp]]:
    """A batch of every shape that may come, and a look at each link, to be called in order. Within
    the block, engines that prefill compile beside those that do not, where they have devices of
    their own. Of each memory holds no more than one batch.

    Args:
      spans_of: the spans between two pools.
      context: tokens of the longest sequence.
    """
    todo, *beside = _lanes(fleet, apart=not config.shared_devices)
    with ExitStack() as threads:
        for lane in beside:
            thread = ThreadPoolExecutor(1, "pdjax warm-up")
            threads.callback(thread.shutdown, cancel_futures=True)
            todo += [thread.submit(warm_up).result for warm_up in lane]
        for (source, target), groups in _links(fleet, config.handoff).items():
            ends, checked = (transport, source, target), config.handoff.checksums
            spans = spans_of(source, target)
            for size, layers in product(spans.buckets, sorted(groups, key=lambda run: run.start)):
                todo.append(partial(_move, *ends, layers, size, spans, checked))
            todo.append(partial(_measure, *ends, context, recorder))
        todo += _feeds(fleet, transport)
        yield todo


def _feeds(fleet: Fleet, transport: Transport) -> Iterator[WarmUp]:
    """A row of each engine that decodes, fed once: the tokens of all that prefill have one
    shape."""
    for target in fleet.decode:
        for source in fleet.prefill:
            ends = source.pool.id, target.pool.id
            if transport.connects(*ends) and transport.writes_ahead(*ends):
                yield partial(_feed, source, target)
                break


def _lanes(fleet: Fleet, *, apart: bool) -> Iterable[list[WarmUp]]:
    """Every step that engines may be given. What is in one lane comes one after another: engines
    alike share their programs."""
    prefilling = {state.pool.id for state in fleet.prefill}
    lanes: dict[bool, list[WarmUp]] = {}
    for state in fleet:
        lanes.setdefault(apart and state.pool.id not in prefilling, []).extend(_steps(state))
    return lanes.values()


def _steps(state: EngineState) -> Iterator[WarmUp]:
    """Every step that an engine may be given, and the history of a row."""
    buckets, engine = state.buckets, state.engine
    shapes = list(buckets.prefill_shapes())
    for shape in shapes:
        yield partial(_step, engine, PrefillStep(empty_prefill_batch(buckets, *shape)))
    if (
        shapes
    ):  # A history is for the choice of the next token, which does not see the step's shape.
        batch = empty_prefill_batch(buckets, *shapes[0], history=True)
        yield partial(_step, engine, PrefillStep(batch))
    if state.pipeline is not None:
        for rows, pages in state.pipeline.shapes():
            yield partial(_tick, state, rows, pages)
        yield partial(engine.set_history, 0, history((), buckets))


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


def _tick(state: EngineState, rows: int, pages: int) -> None:
    _step(state.engine, DecodeStep(state.rows.idle_tick(rows, pages)))


def _move(
    transport: Transport,
    source: PoolState,
    target: PoolState,
    layers: range,
    size: int,
    spans: Spans,
    checked: bool,
) -> None:
    no_pages: list[tuple[list[int], range]] = [([], range(size))]
    from_, to = (spans.pages(no_pages, pool.layout.page_size) for pool in (source, target))
    job = TransferJob(_WARM_UP_JOB, source.id, target.id, layers, from_, 0, checked)
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
