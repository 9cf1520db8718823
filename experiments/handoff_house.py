"""The pair of engines that `handoff` measures, and hand-offs between them, alone and served."""

import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.handoff_trace import Traced, traced
from experiments.step_times import replace_method
from pdjax import LLM, Config, SamplingParams
from pdjax.config import HandoffConfig
from pdjax.core.request import Request
from pdjax.host.coordinator import Coordinator
from pdjax.host.handoff.spans import span_pages
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.transfer import End, Shipment, Side, Transfer, TransferTicket

SOURCE, TARGET = End(Side.PREFILL, 0), End(Side.DECODE, 0)
OUTPUT = 8
"""Tokens of an answer: prefill makes the first, decode the others."""


@dataclass(frozen=True)
class Way:
    """A way for the KV of a prompt to travel: between which layouts, in how many layer groups while
    the prefill runs (0: in bulk, after it), and in which format."""

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
    """A shipment with both engines idle; milliseconds, the best of a few.

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
      added_ms: first token to the dispatch of the sequence's first decode tick.
      delay_ms: first token to second, less the usual gap between later ones: the delay that the
        hand-off adds for a reader, including the writing of pages before the tick.
      wire_ms: time in which any KV was on the wire; at least `floor_ms`, see `Watch.take`.
      exposed_ms: the part of `wire_ms` after the first token.
      arrived_ms: first token to the arrival of the last KV; 0 if it arrived before.
      floor_ms: bytes over the link's bandwidth.
      nbytes, shipments: bytes and shipments of one prompt.
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

    @property
    def hidden(self) -> float:
        """Share of the time on the wire that was hidden behind the prefill."""
        return 1 - self.exposed_ms / self.wire_ms if self.wire_ms else 1.0


class _Seen(NamedTuple):
    """Times of a shipment: sent, its pages seen to be read, and seen to have arrived."""

    sent: float
    read: float
    arrived: float
    nbytes: int


class Watch:
    """Records, in threads of its own, when each shipment's pages were read and when they arrived:
    the coordinator looks only between other work.

    Args:
      transfer: transfer that sends the shipments.
      now: clock.
    """

    def __init__(self, transfer: Transfer, now: Callable[[], float]) -> None:
        self._now, self._threads = now, ThreadPoolExecutor(32)
        self._seen: list[Future[_Seen]] = []
        send = transfer.send

        def watched(shipment: Shipment) -> TransferTicket:
            sent, ticket = now(), send(shipment)
            self._seen.append(self._threads.submit(self._see, sent, ticket))
            return ticket

        replace_method(transfer, "send", watched)

    def _see(self, sent: float, ticket: Any) -> _Seen:
        ticket = getattr(ticket, "ticket", ticket)  # a dispatch thread wraps the ticket
        jax.block_until_ready(ticket.read)
        read = self._now()
        jax.block_until_ready(ticket.pieces)
        return _Seen(sent, read, self._now(), ticket.cost.bytes)

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


class House:
    """One pair of engines, and the ways to hand over between them.

    Args:
      config: config of the engines.
    """

    def __init__(self, config: Config) -> None:
        self.llm = llm = LLM(config)
        engine: Any = llm.prefill_engines[0]
        transfer: Any = llm.coordinator._transfer
        # A dispatch thread may wrap the engine and the transfer.
        self._engine, self._transfer = _unwrapped(engine), type(_unwrapped(transfer))
        self._threaded = None if engine is self._engine else (engine, transfer)
        self._pools = {SOURCE: self._engine._pool, TARGET: llm.decode_engines[0]._pool}

    def open(self, way: Way) -> tuple[Coordinator, Recorder, Transfer]:
        """Make a coordinator for one way and warm it up; all share weights and pools."""
        llm = self.llm
        engine = type(self._engine)(
            self._engine._params,
            llm.spec,
            self._pools[SOURCE],
            max_logprobs=llm.config.max_logprobs,
            layer_groups=way.programs,
        )
        transfer = self._transfer(self._pools, way.handoff.wire_dtype)
        if self._threaded is not None:
            engine, transfer = (
                ours.beside(each)
                for ours, each in zip(self._threaded, (engine, transfer), strict=True)
            )
        recorder = Recorder(llm.clock)
        coordinator = Coordinator(
            replace(llm.config, handoff=way.handoff),
            vocab_size=llm.spec.vocab_size,
            max_model_len=llm.max_model_len,
            end_token_ids=(),
            prefill_engines=[engine],
            decode_engines=llm.decode_engines,
            transfer=transfer,
            clock=llm.clock,
            recorder=recorder,
        )
        coordinator.warm_up()
        return coordinator, recorder, transfer

    def bandwidth(self, nbytes: int) -> float:
        """Measure the bytes a second over all links, by a plain put of `nbytes` on one of them."""
        put = self._transfer(self._pools).probe(SOURCE, TARGET, nbytes)
        return self.links() * nbytes / put

    def links(self) -> int:
        """Number of pairs of devices over which the KV of all layers travels at once."""
        source, target = (self._pools[end].layout for end in (SOURCE, TARGET))
        return min(source.tp, target.tp * target.stages)

    def alone(self, way: Way, coordinator: Coordinator, transfer: Transfer, n: int) -> Alone:
        """Measure a shipment of the pages of n tokens."""
        layout, buckets, now = self._engine.layout, coordinator.buckets, self.llm.clock.now
        spans = -(-n // buckets.span)
        pages = list(range(1, 1 + layout.pages_for(n)))
        from_ = span_pages([(pages, range(spans))], layout.page_size, buckets)
        size = self._pools[TARGET].layout.page_size
        table_pages = list(range(1, 1 + -(-n // size)))
        to = span_pages([(table_pages, range(spans))], size, buckets)
        layers = range(layout.num_layers)
        moving, writing, nbytes = [], [], 0
        for _ in range(5):
            began = now()
            shipment = Shipment(SOURCE, TARGET, layers, from_, len(pages), way.checksums)
            ticket = transfer.send(shipment)
            nbytes = ticket.result().bytes
            arrived = now()
            transfer.land(ticket, to).result()
            moving.append(arrived - began)
            writing.append(now() - arrived)
        put = transfer.probe(SOURCE, TARGET, nbytes // self.links())
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
        shipments = 0
        for turn in range(1 + rounds):
            recorder.clear()
            metrics = recorder.request(self._serve(coordinator, f"{n}/{turn}", n, rng))
            marks, moved, gaps = dict(metrics.marks), metrics.transfer, metrics.itl
            on_wire = watch.take(marks["first_token"], rate)
            ticks = [s.start for s in recorder.spans() if s.track == "decode/0"]
            seen.append(
                [
                    marks["first_token"] - marks["prefill_started"],
                    min(ticks) - marks["first_token"],
                    gaps[0] - statistics.median(gaps[1:]),
                    *on_wire,
                    moved.bytes / rate,
                    moved.bytes,
                ]
            )
            shipments = moved.shipments
        # The first prompt warms up.
        columns = zip(*seen[1:], strict=True)
        medians = map(statistics.median, columns)
        prefill, added, delay, wire, exposed, arrived, floor, nbytes = medians
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
        )

    def traced(
        self, coordinator: Coordinator, transfer: Any, n: int, nbytes: float, rounds: int
    ) -> Traced | None:
        """Trace prompts of n random tokens by the profiler's clock; one moves `nbytes` bytes."""
        put = _unwrapped(transfer).plain_put(SOURCE, TARGET, int(nbytes) // self.links())
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


def _unwrapped(wrapper: Any) -> Any:
    """Return the engine or transfer that a dispatch thread wraps, or the argument itself."""
    return getattr(wrapper, "inner", wrapper)
