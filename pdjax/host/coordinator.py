"""The loop: what comes back from the meshes is read, and what they do next is dispatched.

A sequence waits in the queue; is prefilled, whole or in chunks, in pages reserved for all of it;
has its first token read; waits for a row and pages on the decode side, which are reserved before
anything moves; is transferred; and decodes until it ends, or until it must give its pages to an
older one and starts again from the queue with what it has written so far. It may be aborted
anywhere on this way.

The coordinator never waits for a device: it looks whether a ticket is ready. It knows neither jax
nor wall time, so the same loop drives real meshes, fakes in tests, and simulated engines.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import Any, TypeVar

from pdjax.clock import Clock
from pdjax.config import Config
from pdjax.engine_api import DecodeEngine, PrefillEngine, Sampled, Transfer
from pdjax.host.batch import Buckets, Chunk, history, prefill_batch
from pdjax.host.handoffs import Handoffs
from pdjax.host.lanes import DecodeLane, InFlight, PrefillLane, is_ready, make_lanes
from pdjax.host.limits import Limits, choices
from pdjax.host.member import Member, names
from pdjax.host.metrics import Recorder
from pdjax.host.pipeline import Tick
from pdjax.host.roster import Progress, Roster
from pdjax.host.sched.api import DecodeView, PrefillView
from pdjax.host.sched.decode import FcfsDecode
from pdjax.host.sched.prefill import FcfsPrefill
from pdjax.host.sched.router import LeastLoaded
from pdjax.host.warm_up import WarmUp, warm_ups
from pdjax.request import QueueFull, Request, Sequence, State

WorkT = TypeVar("WorkT")


class Coordinator:
    """Takes requests through prefill, hand-off and decode; call `step` while it `has_work`.

    Args:
      config: bounds and budgets; `prefill`, `decode`, `max_waiting`, `max_logprobs` and `seed` are
        read.
      vocab_size: token ids are below it.
      max_model_len: tokens of prompt and output together.
      end_token_ids: tokens with which the model ends an answer.
      prefill_engines, decode_engines: at least one of each.
      transfer: moves pages from the former to the latter, by their indices.
      clock, recorder: tell the time, and take down what happened when.
      make_text: makes the TextStream of each sequence of a request; None makes no text.

    Raises:
      ValueError: engines or buckets that do not fit together.
    """

    def __init__(
        self,
        config: Config,
        *,
        vocab_size: int,
        max_model_len: int,
        end_token_ids: Iterable[int],
        prefill_engines: Seq[PrefillEngine],
        decode_engines: Seq[DecodeEngine],
        transfer: Transfer,
        clock: Clock,
        recorder: Recorder,
        make_text: Callable[[Request], Any] | None = None,
    ) -> None:
        page_size = prefill_engines[0].layout.page_size
        self.buckets = Buckets.of(config.prefill, config.decode, page_size, max_model_len)
        self._prefill, self._decode = make_lanes(
            prefill_engines, decode_engines, transfer, config.decode.rows, self.buckets
        )
        self._config = config
        self._limits = Limits(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_logprobs=config.max_logprobs,
            max_waiting=config.max_waiting,
            prefill_tokens=max(lane.allocator.total for lane in self._prefill) * page_size,
            decode_tokens=max(lane.allocator.total for lane in self._decode) * page_size,
        )
        self._transfer, self._clock, self._recorder = transfer, clock, recorder
        self._make_text = make_text
        router = LeastLoaded()
        self._prefill_scheduler = FcfsPrefill(self.buckets, config.prefill.token_budget, router)
        self._decode_scheduler = FcfsDecode(self.buckets, router)
        self._roster = Roster(self._prefill, self._decode, recorder, end_token_ids)
        self._handoffs = Handoffs(transfer, self._roster, self.buckets, clock, recorder)
        self._submitted = 0
        self._idle_turns = 0

    # What a front end calls.

    def check_request(self, request: Request) -> None:
        """Refuse what can never be served.

        Raises:
          ValueError: naming the field, its value and what is allowed.
        """
        self._limits.check(request)

    def has_room(self, choices: int) -> bool:
        """Whether the waiting queue has room for so many more sequences."""
        return len(self._roster.waiting) + choices <= self._limits.max_waiting

    def submit(self, request: Request) -> list[Sequence]:
        """Queue a request: all of its choices, or none.

        Raises:
          ValueError: it can never be served, or its id is in use.
          QueueFull: the waiting queue has no room for all its choices.
        """
        if request.id in self._roster.live:
            raise ValueError(f"id={request.id!r}: in use by a live request; must be unique")
        self._limits.check(request)
        if not self.has_room(request.params.n):
            raise QueueFull(
                f"{len(self._roster.waiting)} sequences wait already; n={request.params.n} more do "
                f"not fit into a queue of max_waiting={self._limits.max_waiting}"
            )
        sequences = choices(request, self._limits, self._submitted, self._config.seed)
        if self._make_text is not None:
            for sequence in sequences:
                sequence.text = self._make_text(request)
        self._submitted += len(sequences)
        self._roster.arrive(request, sequences)
        return sequences

    def abort(self, request_id: str) -> bool:
        """End a request, wherever its sequences are. Returns whether there was anything to end."""
        sequences = list(self._roster.live.get(request_id, ()))
        for sequence in sequences:
            self._roster.end(sequence, State.ABORTED, "abort")
        return bool(sequences)

    @property
    def has_work(self) -> bool:
        """Whether a step may still do something, or has something to tell."""
        lanes: list[PrefillLane | DecodeLane] = [*self._prefill, *self._decode]
        in_flight = bool(self._handoffs.in_flight) or any(lane.in_flight for lane in lanes)
        return in_flight or bool(self._roster.live) or self._roster.has_news

    def step(self) -> list[Progress]:
        """Go once around; returns what is new since the last time.

        Decode goes first, both to be read and to be dispatched, since it is the side whose
        latency is felt with every token.
        """
        busy = self._harvest_decode()
        busy |= self._land_transfers()
        busy |= self._dispatch_decode()
        busy |= self._harvest_prefill()
        busy |= self._reserve_then_move()
        busy |= self._dispatch_prefill()
        self._idle_turns = 0 if busy or self._roster.has_news else self._idle_turns + 1
        if self._idle_turns:
            self._clock.idle(self._idle_turns)
        return self._roster.take_news()

    # The parts of a step, in its order. Each returns whether it changed anything.

    def _harvest_decode(self) -> bool:
        busy = False
        for lane in self._decode:
            for done in _take_ready(lane.in_flight):
                self._harvest_tick(lane, done)
                busy = True
        return busy

    def _land_transfers(self) -> bool:
        return self._handoffs.land()

    def _dispatch_decode(self) -> bool:
        ready = [
            lane
            for lane in self._decode
            if len(lane.in_flight) <= self._config.decode.lookahead and lane.pipeline.active
        ]
        for lane in ready:
            lane.pipeline.align()
            self._grow(lane)
            self._remember(lane)
            if lane.pipeline.active:  # not everybody had to give way
                self._dispatch_tick(lane, lane.pipeline.tick())
        return bool(ready)

    def _harvest_prefill(self) -> bool:
        busy = False
        for lane in self._prefill:
            for done in _take_ready(lane.in_flight):
                self._harvest_step(lane, done)
                busy = True
        return busy

    def _reserve_then_move(self) -> bool:
        if not self._roster.prefilled:
            return False
        views = [self._decode_view(lane) for lane in self._decode]
        admissions = self._decode_scheduler.admit(self._roster.prefilled, views)
        for admission in admissions:
            source = self._prefill[admission.sequence.engine]
            target = self._decode[admission.engine]
            self._handoffs.begin(admission.sequence, source, target, admission.pages)
        return bool(admissions)

    def _dispatch_prefill(self) -> bool:
        if not self._roster.waiting and not any(lane.running for lane in self._prefill):
            return False
        views = [self._prefill_view(lane) for lane in self._prefill]
        plans = self._prefill_scheduler.plan(self._roster.waiting, views)
        for plan in plans:
            self._dispatch_step(self._prefill[plan.engine], plan.chunks)
        return bool(plans)

    # Decode.

    def _grow(self, lane: DecodeLane) -> None:
        """See that everybody who enters has a page for the position that he writes."""
        needy = lane.pipeline.needy()
        if needy:
            holders = self._roster.holders(lane)
            plan = self._decode_scheduler.grow(needy, holders, lane.allocator.free_pages)
            for victim in plan.victims:
                self._roster.preempt(victim)
            for sequence in plan.grown:
                sequence.pages += lane.allocator.allocate(1)

    def _remember(self, lane: DecodeLane) -> None:
        """Tell the device what those who join have said so far, if they are penalized for it.

        Not before they join: until then the device may still sample for whoever had the row.
        """
        for sequence in lane.pipeline.joining():
            if sequence.request.params.penalized:
                try:
                    lane.engine.remember(sequence.row, history(sequence.token_ids, self.buckets))
                except Exception as error:
                    self._roster.fail(sequence, error)

    def _dispatch_tick(self, lane: DecodeLane, tick: Tick) -> None:
        started = self._clock.now()
        try:
            ticket = lane.engine.tick(tick.batch)
        except BaseException as error:
            # Also where somebody pressed a key: nobody knows how far the device has come.
            self._roster.fail_all(tick.aboard, error)
            if not isinstance(error, Exception):
                raise
        else:
            lane.in_flight.append(InFlight(tick, ticket, started, tick.aboard))

    def _harvest_tick(self, lane: DecodeLane, done: InFlight[Tick, Sampled]) -> None:
        tick = done.work
        self._recorder.span(
            f"decode/{lane.index}",
            "tick",
            done.started,
            self._clock.now(),
            rows_active=len(tick.aboard),
            rows=lane.pipeline.rows,
            stages_active=tick.stages_active,
            stages=lane.pipeline.stages,
            who=names(done.members),
        )
        sampled = self._read(done)
        if sampled is not None:
            self._roster.accept(tick.leaving, sampled)

    # Prefill.

    def _dispatch_step(self, lane: PrefillLane, chunks: tuple[Chunk, ...]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.state is State.WAITING:
                self._roster.admit(sequence, lane, self.buckets.pages_for(sequence.length))
                self._recorder.mark(sequence, "prefill_started")
            sequence.prefilled = chunk.stop
        batch, started = prefill_batch(chunks, self.buckets), self._clock.now()
        members = tuple(Member.of(chunk.sequence) for chunk in chunks)
        try:
            ticket = lane.engine.prefill(batch)
        except BaseException as error:
            self._roster.fail_all(members, error)
            if not isinstance(error, Exception):
                raise
        else:
            lane.in_flight.append(InFlight(chunks, ticket, started, members))

    def _harvest_step(self, lane: PrefillLane, done: InFlight[tuple[Chunk, ...], Sampled]) -> None:
        tokens = sum(chunk.tokens for chunk in done.work)
        self._recorder.span(
            f"prefill/{lane.index}",
            "step",
            done.started,
            self._clock.now(),
            tokens=tokens,
            sequences=len(done.work),
            who=names(done.members),
        )
        sampled = self._read(done)
        if sampled is None:
            return
        for row, (chunk, member) in enumerate(zip(done.work, done.members, strict=True)):
            if not member.current or not chunk.last:
                continue
            sequence = chunk.sequence
            self._recorder.mark(sequence, "first_token")
            self._roster.accept([(row, member)], sampled)
            if not sequence.done:
                self._roster.wait_for_decode(sequence)

    def _read(self, done: InFlight[Any, Sampled]) -> Sampled | None:
        """What has come back; None where it has failed, and those whom it was for with it."""
        try:
            return done.ticket.result()
        except BaseException as error:
            self._roster.fail_all(done.members, error)
            if not isinstance(error, Exception):
                raise
            return None

    # What the schedulers see.

    def _prefill_view(self, lane: PrefillLane) -> PrefillView:
        # In a shared pool, a page in hand for everybody who decodes: see FcfsDecode.
        in_hand = sum(
            decode.pipeline.taken_rows
            for decode in self._decode
            if lane.index in decode.shares_with
        )
        return PrefillView(
            engine=lane.index,
            open=len(lane.in_flight) <= self._config.prefill.lookahead,
            running=tuple(seq for seq in lane.running if seq.prefilled < seq.length),
            backlog=lane.backlog,
            free_pages=max(0, lane.allocator.free_pages - in_hand),
            total_pages=lane.allocator.total,
        )

    def _decode_view(self, lane: DecodeLane) -> DecodeView:
        return DecodeView(
            engine=lane.index,
            rows=lane.pipeline.rows,
            free_rows=lane.pipeline.rows - lane.pipeline.taken_rows,
            free_pages=lane.allocator.free_pages,
            total_pages=lane.allocator.total,
            shares_with=lane.shares_with,
        )

    # Before and after.

    def warm_up(self, show: Callable[[list[WarmUp]], Iterable[WarmUp]] = iter) -> int:
        """Send a batch of every bucket through the door, so that nothing is compiled later.

        To be called before the first request.

        Args:
          show: goes through what there is to do, and may show how far it has come.

        Returns:
          how many there were.
        """
        assert not self.has_work, "somebody would have to wait"
        todo = warm_ups(self._prefill, self._decode, self._transfer, self.buckets)
        for warm_up in show(todo):
            warm_up()
        return len(todo)

    def check(self) -> None:
        """Assert that every page and row is free, or held by exactly those who are known."""
        held = self._roster.pages_held()
        for handoff in self._handoffs.in_flight:
            held[handoff.source.allocator] += handoff.source_pages
            held[handoff.target.allocator] += handoff.target_pages
        for allocator, pages in held.items():
            allocator.check(pages)
        for lane in self._decode:
            coming = sum(handoff.target is lane for handoff in self._handoffs.in_flight)
            taken = lane.pipeline.taken_rows
            assert taken == len(lane.sequences) + coming, f"decode/{lane.index}: rows leaked"


def _take_ready(in_flight: deque[InFlight[WorkT, Any]]) -> Iterator[InFlight[WorkT, Any]]:
    """Take out those at the front that have come back; an engine works in order."""
    while in_flight and is_ready(in_flight[0].ticket):
        yield in_flight.popleft()
