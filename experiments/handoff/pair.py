"""The pair of engines that `handoff` measures, and hand-offs between them, alone and served."""

import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from experiments.common.llm_engines import DECODE, PREFILL, engines_of
from experiments.common.replaced import replace_method
from experiments.handoff.trace import Traced, traced
from pdjax import LLM, Config, SamplingParams
from pdjax.config import HandoffConfig
from pdjax.core.request import Request
from pdjax.host.coordinator import Coordinator
from pdjax.host.events import PolledEvents
from pdjax.host.handoff.spans import Spans
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import FirstGap
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.transport import TransferJob, TransferTicket, Transport

OUTPUT = 8
"""Tokens of an answer: prefill makes the first, decode the others."""


@dataclass(frozen=True)
class Way:
    """A way for the KV of a prompt to travel.

    Attributes:
      layout: prefill shards x decode stages x shards of a stage.
      groups: layer groups that leave while the prefill runs; 0 is in bulk, after it.
      wire: "exact", or the dtype of the KV in transit.
      checksums: whether every page is checked on arrival.
    """

    layout: str
    groups: int
    wire: str
    checksums: bool

    @property
    def programs(self) -> int:
        """Number of programs of a prefill step."""
        return max(1, self.groups)

    @property
    def handoff(self) -> HandoffConfig:
        return HandoffConfig(
            streaming=self.groups > 0,
            layer_groups=self.programs,
            wire_dtype=None if self.wire == "exact" else self.wire,
            checksums=self.checksums,
        )


def in_groups(groups: int) -> str:
    """Name a way's layer groups for a table."""
    return f"in {groups}" if groups else "in bulk"


@dataclass(frozen=True)
class Alone:
    """A transfer job with nothing beside it; milliseconds, the best of a few.

    Attributes:
      nbytes: bytes that travelled.
      gather_wire_ms: time from dispatch to arrival.
      scatter_ms: time from arrival until the pages are written.
      put_ms: time of one plain put of as many bytes as one link carries of the shipment.
    """

    nbytes: int
    gather_wire_ms: float
    scatter_ms: float
    put_ms: float

    @property
    def of_put(self) -> float:
        """The shipment's rate from dispatch to arrival, as a share of the plain put's."""
        return self.put_ms / self.gather_wire_ms


@dataclass(frozen=True)
class Served:
    """Medians over the prompts of a kind; milliseconds.

    Attributes:
      prefill_ms: dispatch of the first chunk to the first token.
      added_ms: first token to the dispatch of the sequence's first decode tick; negative where that
        was dispatched before.
      delay_ms: first token to second, less the usual gap between later ones: the delay that the
        hand-off adds for a reader, including the writing of pages before the tick.
      wire_ms: time in which any KV was on the wire; at least `floor_ms`, see `Watch.take`.
      exposed_ms: the part of `wire_ms` after the first token.
      arrived_ms: first token to the arrival of the last KV; 0 if it arrived before.
      floor_ms: bytes over the link's bandwidth.
      nbytes, shipments: bytes and shipments of one prompt.
      first_gap_ms: parts of the gap between the first token and the second, see `FirstGap`.
      usual_gap_ms: of later tokens.
    """

    prefill_ms: float
    added_ms: float
    delay_ms: float
    wire_ms: float
    exposed_ms: float
    arrived_ms: float
    floor_ms: float
    nbytes: float
    shipments: int
    first_gap_ms: dict[str, float]
    usual_gap_ms: float

    @property
    def hidden(self) -> float:
        """Share of the time on the wire that was hidden behind the prefill."""
        return 1 - self.exposed_ms / self.wire_ms if self.wire_ms else 1.0


_ALONE = itertools.count(1 << 32)
"""Ids of jobs that no coordinator sends."""


class _Seen(NamedTuple):
    """Moments of a transfer job: sent, its pages seen to have been read, and to have arrived."""

    sent: float
    read: float
    arrived: float
    nbytes: int


class Watch:
    """Observes, in threads of its own, when the pages of each transfer job have been read, and when
    they have arrived: the coordinator looks only between other things.

    Args:
      transport: whose jobs; of one kind of link, so that exports of steps are seen, too.
      now: the clock.
    """

    def __init__(self, transport: Transport, now: Callable[[], float]) -> None:
        self._now, self._threads = now, ThreadPoolExecutor(32)
        self._seen: list[Future[_Seen]] = []
        send = transport.send

        def watched(job: TransferJob) -> TransferTicket:
            sent, ticket = now(), send(job)
            self._seen.append(self._threads.submit(self._see, sent, ticket))
            return ticket

        replace_method(transport, "send", watched)

    def _see(self, sent: float, ticket: TransferTicket) -> _Seen:
        ticket.read.result()
        read = self._now()
        nbytes = ticket.result().bytes
        return _Seen(sent, read, self._now(), nbytes)

    def take(self, ended: float, rate: float) -> tuple[float, float, float]:
        """Return, since the last call, the seconds in which any KV was on the wire, their part
        after the moment `ended`, and the time from then to the last arrival.

        Threads wake up late, so each shipment counts as on the wire for at least its bytes over
        `rate`, in bytes a second.
        """
        seen, self._seen = sorted(each.result() for each in self._seen), []
        wire = exposed = 0.0
        last = float("-inf")
        for each in seen:
            least = each.arrived - each.nbytes / rate
            start = max(each.sent, min(each.read, least), last)
            wire += max(0.0, each.arrived - start)
            exposed += max(0.0, each.arrived - max(start, ended))
            last = max(last, each.arrived)
        return wire, exposed, max(0.0, last - ended)


class EnginePair:
    """A prefill engine and a decode engine, and the ways to hand over between them.

    Args:
      config: config of the engines.
    """

    def __init__(self, config: Config) -> None:
        self.llm = llm = LLM(config)
        [self._source, *_], [self._target, *_] = (
            engines_of(llm, kind) for kind in (PREFILL, DECODE)
        )
        self._pools = self._source.pool, self._target.pool

    def open(self, way: Way) -> tuple[Coordinator, Recorder, Any]:
        """Make a warm coordinator for one way, its recorder and its transport. All ways share
        weights and pools."""
        llm = self.llm
        engines = llm.deployment.backing.handing_over(way.handoff, way.programs)
        recorder = Recorder(llm.clock)
        coordinator = Coordinator(
            replace(llm.config, handoff=way.handoff),
            vocab_size=llm.spec.vocab_size,
            max_model_len=llm.max_model_len,
            end_token_ids=(),
            engines=engines.engines,
            transport=engines.transport,
            events=PolledEvents(llm.clock),
            clock=llm.clock,
            recorder=recorder,
        )
        coordinator.warm_up()
        return coordinator, recorder, engines.transport

    def bandwidth(self, nbytes: int) -> float:
        """Measure the bytes a second over all links, by a plain put of `nbytes` on one of them."""
        put = self.llm.transport.measure(*self._pools, nbytes).result()
        return self.links() * nbytes / put

    def links(self) -> int:
        """Return the number of pairs of devices over which the KV of all layers travels at once."""
        source, target = self._source.layout, self._target.layout
        return min(source.tp, target.tp * target.stages)

    def alone(self, way: Way, transport: Transport, n: int) -> Alone:
        """Measure a transfer job of the pages of n tokens."""
        source, target, now = self._source.layout, self._target.layout, self.llm.clock.now
        spans = Spans.between(source, target, self.llm.max_model_len)
        moved = range(-(-n // spans.tokens))
        pages = list(range(1, 1 + source.pages_for(n)))
        from_ = spans.pages([(pages, moved)], source.page_size)
        to = spans.pages([(range(1, 1 + target.pages_for(n)), moved)], target.page_size)
        layers = range(source.num_layers)
        moving, writing, nbytes = [], [], 0
        for _ in range(5):
            began = now()
            job = TransferJob(next(_ALONE), *self._pools, layers, from_, len(pages), way.checksums)
            nbytes = transport.send(job).result().bytes
            arrived = now()
            transport.write(job.id, to).result()
            moving.append(arrived - began)
            writing.append(now() - arrived)
        put = transport.measure(*self._pools, nbytes // self.links()).result()
        return Alone(nbytes, min(moving) * 1e3, min(writing) * 1e3, put * 1e3)

    def served(
        self,
        coordinator: Coordinator,
        recorder: Recorder,
        watch: Watch,
        n: int,
        rounds: int,
        rate: float,
    ) -> Served:
        """Serve prompts of n random tokens, one at a time; `rate` is the link's bytes a second."""
        rng = np.random.default_rng(n)
        seen: list[list[float]] = []
        first_gaps: list[FirstGap] = []
        shipments = 0
        for turn in range(1 + rounds):
            recorder.clear()
            metrics = recorder.request(self._serve(coordinator, f"{n}/{turn}", n, rng))
            marks, moved, gaps = dict(metrics.marks), metrics.transfer, metrics.itl
            on_wire = watch.take(marks["first_token"], rate)
            usual = statistics.median(gaps[1:])
            assert metrics.first_gap is not None, "a hand-off has ended"
            first_gaps.append(metrics.first_gap)
            ticks = [s.start for s in recorder.spans() if s.track == "decode/0"]
            seen.append(
                [
                    marks["first_token"] - marks["prefill_started"],
                    min(ticks) - marks["first_token"],
                    gaps[0] - usual,
                    *on_wire,
                    moved.bytes / rate,
                    moved.bytes,
                    usual,
                ]
            )
            shipments = moved.shipments
        # The first prompt warms up.
        columns = zip(*seen[1:], strict=True)
        medians = map(statistics.median, columns)
        prefill, added, delay, wire, exposed, arrived, floor, nbytes, usual = medians
        return Served(
            prefill_ms=prefill * 1e3,
            added_ms=added * 1e3,
            delay_ms=delay * 1e3,
            wire_ms=wire * 1e3,
            exposed_ms=exposed * 1e3,
            arrived_ms=arrived * 1e3,
            floor_ms=floor * 1e3,
            nbytes=nbytes,
            shipments=shipments,
            first_gap_ms={
                name: statistics.median(getattr(gap, name) or 0.0 for gap in first_gaps[1:]) * 1e3
                for name in FirstGap._fields
            },
            usual_gap_ms=usual * 1e3,
        )

    def traced(
        self, coordinator: Coordinator, transport: Any, n: int, nbytes: float, rounds: int
    ) -> Traced | None:
        """Time prompts of n random tokens by the profiler's clock; each moves `nbytes`."""
        [over_devices] = transport.transports
        put = over_devices.plain_put(*self._pools, int(nbytes) // self.links())
        rng, turns = np.random.default_rng(n), itertools.count()

        def serve() -> None:
            self._serve(coordinator, f"{n}/traced/{next(turns)}", n, rng)

        put()
        return traced(put, serve, rounds)

    def _serve(
        self, coordinator: Coordinator, name: str, n: int, rng: np.random.Generator
    ) -> Sequence:
        """Serve one prompt to its end."""
        prompt = tuple(rng.integers(1, self.llm.spec.vocab_size, n).tolist())
        params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
        [sequence] = coordinator.submit(Request(name, prompt, params, self.llm.clock.now()))
        while coordinator.has_work:
            coordinator.step()
        if sequence.error is not None:
            raise RuntimeError(f"prompt={n}: {sequence.error}")
        return sequence
