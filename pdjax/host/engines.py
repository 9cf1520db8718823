"""What the coordinator keeps about each engine: its sequences, its pool, its steps in flight."""

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from pdjax.core.ids import EngineId, PoolId
from pdjax.core.roles import Role
from pdjax.host.batching.buckets import Buckets
from pdjax.host.batching.chunks import Chunk
from pdjax.host.batching.decode_pipeline import DecodePipeline, Tick
from pdjax.host.kv.pages import PageAllocator
from pdjax.host.kv.pools import PoolState
from pdjax.host.policies.api import EngineView
from pdjax.host.sequences.reference import SequenceRef
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.service import Service
from pdjax.host.step_times import StepTimes
from pdjax.interfaces.batches import Sampled
from pdjax.interfaces.engine import Engine
from pdjax.interfaces.events import StepDone
from pdjax.interfaces.steps import StepKind
from pdjax.interfaces.tickets import Ticket


class Mixed(NamedTuple):
    """What a mixed step computes."""

    chunks: tuple[Chunk, ...]
    tick: Tick

    @property
    def refs(self) -> tuple[SequenceRef, ...]:
        """Of the chunks, then of the rows."""
        return *(SequenceRef.of(chunk.sequence) for chunk in self.chunks), *self.tick.refs

    @property
    def tokens(self) -> int:
        """Of the chunks, and one of each row."""
        return sum(chunk.tokens for chunk in self.chunks) + len(self.tick.refs)

    def parts(
        self, done: "InFlight[Mixed]"
    ) -> "tuple[InFlight[tuple[Chunk, ...]], InFlight[Tick]]":
        """A step in flight as if its chunks and its rows were two."""
        refs = done.refs[: len(self.chunks)]
        chunks = InFlight(
            StepKind.PREFILL, self.chunks, done.ticket, done.started, refs, done.number, done.scored
        )
        return chunks, InFlight(
            StepKind.DECODE, self.tick, done.ticket, done.started, self.tick.refs
        )


_MOST_PLAIN = 1000
"""Ticks without chunks after which it is tried anew what chunks take."""

Work = tuple[Chunk, ...] | Tick | Mixed
"""What a step computes: of prefill, of decode, or of both."""

WorkT = TypeVar("WorkT", bound=Work)


class InFlight(NamedTuple, Generic[WorkT]):
    """A step that was dispatched and has not been read: what it is, its ticket, and the sequences
    that an error of it concerns; `number`, that of the last step of its engine that had chunks.
    Where it has chunks itself, the places of prompts, by its chunks, whose log-probabilities it
    brings (`Chunk.scored`)."""

    kind: StepKind
    work: WorkT
    ticket: Ticket[Sampled]
    started: float
    refs: tuple[SequenceRef, ...]
    number: int = 0
    scored: tuple[range, ...] = ()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """That it computes; none where it is a tick."""
        work: Any = self.work
        if self.kind is StepKind.DECODE:
            return ()
        return work.chunks if self.kind is StepKind.MIXED else work


@dataclass(eq=False, slots=True)
class EngineState:
    """An engine, as the host keeps it. What it accepts says what it can do; its role, which may
    change while it runs, says what new work it is given.

    Attributes:
      index: place among all engines; the host goes through them in this order.
      engine: behind the door.
      service: its role, and whether it is in service.
      pool: the pages; engines that share a pool share this.
      buckets: sizes of its steps.
      pipeline: its decode rows; None where it accepts no decode step.
      sources: the pools from which KV can come to its pool, its own included.
      prefill_lookahead, decode_lookahead: steps of that kind that may be in flight when another one
        is dispatched.
      losses: those of the engine that the host has taken account of.
      running: its PREFILLING sequences, oldest first. `decoding`: its DECODING ones.
      in_flight: steps in the order of their dispatch. `came_back`: the first ones of them, that can
        be read.
      steps: prefill steps that it has been given.
      paused: whether no tick is dispatched.
      view: what policies see of it; None where something has happened to it since they looked.
      prefill_times, token_times, tick_times, chunk_times: see `EngineView`. `read_at`: moment at
        which a step of it was read last, or 0. `plain`: ticks since its last mixed step.
      paces: the times between tokens that its rows ask for by their SLO, ascending.
    """

    index: int
    engine: Engine
    service: Service
    pool: PoolState
    buckets: Buckets
    pipeline: DecodePipeline | None
    sources: frozenset[PoolId]
    prefill_lookahead: int
    decode_lookahead: int
    losses: int
    running: list[Sequence] = field(default_factory=list)
    decoding: list[Sequence] = field(default_factory=list)
    in_flight: deque[InFlight] = field(default_factory=deque)
    came_back: int = 0
    steps: int = 0
    paused: bool = False
    view: EngineView | None = None
    prefill_times: StepTimes = field(default_factory=StepTimes)
    token_times: StepTimes = field(default_factory=StepTimes)
    tick_times: StepTimes = field(default_factory=StepTimes)
    chunk_times: StepTimes = field(default_factory=StepTimes)
    read_at: float = 0.0
    plain: int = 0
    paces: list[float] = field(default_factory=list)
    # Kept, not worked out: they are asked for with every step.
    id: EngineId = field(init=False)
    prefills: bool = field(init=False)
    decodes: bool = field(init=False)
    mixes: bool = field(init=False)
    step_done: StepDone = field(init=False)

    def __post_init__(self) -> None:
        self.id = self.engine.id
        self.prefills = StepKind.PREFILL in self.engine.accepts
        self.decodes = StepKind.DECODE in self.engine.accepts
        self.mixes = StepKind.MIXED in self.engine.accepts
        self.step_done = StepDone(self.id)

    @property
    def role(self) -> Role:
        """What it is given to do."""
        return self.service.role

    @property
    def takes_prompts(self) -> bool:
        """Whether it may be given prompts that wait, when it has room."""
        return self.service.gives_prompts

    @property
    def takes_rows(self) -> bool:
        """Whether it may be given sequences to decode, when it has room."""
        return self.service.gives_rows

    @property
    def takes_row(self) -> bool:
        """Whether it may be given a sequence to decode, and has a row for it."""
        return self.takes_rows and self.free_rows > 0

    @property
    def takes_any(self) -> bool:
        """Whether it may be given any new work."""
        return self.takes_prompts or self.takes_rows

    @property
    def allocator(self) -> PageAllocator:
        """Of its pool."""
        return self.pool.allocator

    @property
    def rows(self) -> DecodePipeline:
        """Its decode rows."""
        assert self.pipeline is not None, f"{self.id} has no decode rows"
        return self.pipeline

    @property
    def free_rows(self) -> int:
        """Decode rows that are free; 0 where it accepts no decode step."""
        return 0 if self.pipeline is None else self.pipeline.rows - self.pipeline.taken_rows

    @property
    def takes_prefill(self) -> bool:
        """Whether it accepts a step of chunks, and has few enough in flight."""
        if self.mixes and self.role is not Role.PREFILL:
            return len(self.in_flight) <= self.decode_lookahead
        return self.prefills and self._under_way(StepKind.PREFILL) <= self.prefill_lookahead

    @property
    def takes_tick(self) -> bool:
        """Whether it accepts a tick, and has few enough of them in flight."""
        if self.mixes or not self.prefills:
            return self.decodes and len(self.in_flight) <= self.decode_lookahead
        return self.decodes and self._under_way(StepKind.DECODE) <= self.decode_lookahead

    def _under_way(self, kind: StepKind) -> int:
        """Steps of a kind in flight. Where an engine accepts both kinds they are counted apart:
        ticks, which go first, would keep prompts waiting for as long as anything decodes."""
        if not (self.prefills and self.decodes):
            return len(self.in_flight)
        return sum(step.kind is kind for step in self.in_flight)

    @property
    def can_tick(self) -> bool:
        """Whether a tick would do anything now."""
        rows = self.pipeline
        return rows is not None and self.takes_tick and not self.paused and rows.active

    @property
    def beside_rows(self) -> int | None:
        """Most prompt tokens of its next step, if rows are in the same step, or may come while it
        runs, as to an engine that is for decode."""
        rows = self.pipeline
        if not self.mixes or rows is None:
            return None
        if self.role is Role.DECODE or (rows.active and not self.paused):
            return self.buckets.most_mixed
        return None

    @property
    def goes_on(self) -> bool:
        """Whether it takes a prefill step now, and has tokens of its own that have not been
        dispatched."""
        return self.takes_prefill and any(map(_is_to_compute, self.running))

    def time(self, done: InFlight, size: int, now: float) -> bool:
        """Note what a step of `size` tokens, of which each active row is one, took that has come
        back. It began when the one before it had ended: an engine works in order. Of two that are
        found at once the second counts as no time, and the first as that of both. Returns whether
        it is the first of its kind."""
        seconds, self.read_at = now - max(done.started, self.read_at), now
        kind, is_first = done.kind, False
        if kind is not StepKind.DECODE:
            is_first = not self.prefill_times.measured
            self.prefill_times.add(size, seconds)
        if kind is not StepKind.PREFILL:
            is_first |= not self.token_times.measured
            chunks = sum(chunk.tokens for chunk in done.chunks) if self.mixes else 0
            self.token_times.add(size - chunks, seconds * self.rows.stages)
            if self.mixes:
                self._time_mixing(size - chunks, chunks, seconds)
        return is_first

    def _time_mixing(self, rows: int, chunks: int, seconds: float) -> None:
        """Note what a tick has taken of an engine that mixes, or chunks have added to one. What is
        known of chunks is forgotten after many ticks without any: else one slow step could close an
        engine to prompts for ever."""
        if not chunks:
            self.tick_times.add(rows, seconds)
            self.plain += 1
            if self.plain > _MOST_PLAIN and self.chunk_times.measured:
                self.chunk_times = StepTimes()
            return
        self.plain, tick = 0, self.tick_times.seconds(rows)
        if tick is not None:
            self.chunk_times.add(chunks, max(0.0, seconds - tick))

    def forget_times(self) -> None:
        """Measure steps anew."""
        self.prefill_times, self.token_times = StepTimes(), StepTimes()
        self.tick_times, self.chunk_times = StepTimes(), StepTimes()

    def take_row(self, sequence: Sequence) -> None:
        """One more sequence decodes."""
        self.decoding.append(sequence)
        if (pace := _pace(sequence)) is not None:
            insort(self.paces, pace)

    def leave_row(self, sequence: Sequence) -> None:
        """A sequence decodes no longer."""
        self.decoding.remove(sequence)
        if (pace := _pace(sequence)) is not None:
            self.paces.remove(pace)

    @property
    def backlog(self) -> int:
        """Prompt tokens to compute, or being computed."""
        computing = sum(chunk.tokens for step in self.in_flight for chunk in step.chunks)
        return computing + sum(seq.length - seq.prefilled for seq in self.running)


def _is_to_compute(sequence: Sequence) -> bool:
    """Whether a sequence has tokens that no step has been given, and may be given to one."""
    return sequence.prefilled < sequence.length and not sequence.behind


def _pace(sequence: Sequence) -> float | None:
    """The time between tokens that a sequence's request asks for."""
    slo = sequence.request.slo
    return None if slo is None else slo.tpot


def view_of(state: EngineState, sharing: Iterable[EngineState]) -> EngineView:
    """What a policy sees of an engine; `sharing` are the engines of its pool."""
    pool, rows = state.pool, state.pipeline
    decoding = [each.rows for each in sharing if each.decodes]

    def cached(sequence: Sequence) -> int:
        if pool.prefixes is None:
            return 0
        return pool.prefixes.known_tokens(sequence, sequence.reusable)

    return EngineView(
        engine=state.id,
        pool=pool.id,
        accepts=state.engine.accepts,
        role=state.role,
        buckets=state.buckets,
        open=state.takes_prefill,
        running=tuple(filter(_is_to_compute, state.running)),
        backlog=state.backlog if state.prefills else 0,
        steps=state.steps,
        rows=0 if rows is None else rows.rows,
        free_rows=state.free_rows,
        free_pages=pool.allocator.free_pages,
        total_pages=pool.allocator.total,
        rows_of_pool=sum([each.taken_rows for each in decoding]),
        cached=cached,
        sources=state.sources,
        in_flight=sum([bool(step.chunks) for step in state.in_flight]),
        leaving_pages=pool.leaving,
        prefill_times=state.prefill_times,
        token_times=state.token_times,
        beside_rows=state.beside_rows,
        tick_times=state.tick_times,
        chunk_times=state.chunk_times,
        tpot=state.paces[0] if state.paces else None,
        free_rows_of_pool=sum([each.rows - each.taken_rows for each in decoding])
        if decoding
        else None,
    )
