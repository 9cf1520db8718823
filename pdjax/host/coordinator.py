"""The loop: what comes back from the meshes is read, and what they do next is dispatched.

A sequence waits in the queue; is prefilled, whole or in chunks, in pages reserved for all of it;
has its first token read; waits for a row and pages on the decode side, which are reserved before
anything moves (where there is room, they are reserved ahead, and KV leaves as it is computed); is
transferred; and decodes until it ends, or until it must give its pages to an older one and starts
again from the queue with what it has written so far. It may be aborted anywhere on this way.

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
from pdjax.host.batch import Buckets, history
from pdjax.host.handoffs import Handoffs
from pdjax.host.lanes import DecodeLane, InFlight, Lane, is_ready, make_lanes
from pdjax.host.limits import Limits, choices
from pdjax.host.member import names
from pdjax.host.metrics import Recorder
from pdjax.host.pipeline import Tick
from pdjax.host.prefilling import Prefilling
from pdjax.host.roster import Progress, Roster, read
from pdjax.host.sched.decode import FcfsDecode
from pdjax.host.sched.handoff import HandoffRules
from pdjax.host.sched.prefill import FcfsPrefill
from pdjax.host.sched.router import LeastLoaded
from pdjax.host.views import decode_view, prefill_view
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

    Attributes:
      on_news: told, in the middle of a step, what is new since the last time, if that step takes
        long; what it has been told, `step` does not return. None leaves all news to `step`.

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
        size = prefill_engines[0].layout.page_size
        table_size = decode_engines[0].layout.page_size
        self.buckets = Buckets.of(config.prefill, config.decode, size, max_model_len, table_size)
        self._prefill, self._decode = make_lanes(
            prefill_engines,
            decode_engines,
            transfer,
            config.decode.rows,
            self.buckets,
            prefix_cache=config.kv.prefix_cache,
        )
        self._config = config
        self._limits = Limits(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_logprobs=config.max_logprobs,
            max_waiting=config.max_waiting,
            prefill_tokens=max(lane.allocator.total for lane in self._prefill) * size,
            decode_tokens=max(lane.allocator.total for lane in self._decode) * table_size,
        )
        self._transfer, self._clock, self._recorder = transfer, clock, recorder
        self._make_text = make_text
        router = LeastLoaded()
        self._prefill_scheduler = FcfsPrefill(self.buckets, config.prefill.token_budget, router)
        self._decode_scheduler = FcfsDecode(self.buckets, router)
        self._handoff_scheduler = HandoffRules(config.handoff, self.buckets)
        self._roster = Roster(self._prefill, self._decode, recorder, end_token_ids)
        self._handoffs = Handoffs(
            config.handoff, transfer, self._roster, self.buckets, clock, recorder
        )
        self._prefilling = Prefilling(
            self._decode,
            self._roster,
            self._handoffs,
            self._decode_scheduler,
            self._handoff_scheduler,
            self.buckets,
            clock,
            recorder,
            self._between_groups,
        )
        self.on_news: Callable[[list[Progress]], None] | None = None
        self._ended: list[tuple[Sequence, DecodeLane]] = []
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
        lanes: list[Lane] = [*self._prefill, *self._decode]
        in_flight = self._handoffs.busy or any(lane.in_flight for lane in lanes)
        return in_flight or bool(self._roster.live) or self._roster.has_news

    def step(self) -> list[Progress]:
        """Go once around; returns what is new since the last time.

        Decode goes first, both to be read and to be dispatched, since it is the side whose
        latency is felt with every token.
        """
        busy = self._serve_decode()
        if self._harvest_prefill():
            busy = True
            self._dispatch_decode()  # whose KV is there already need not wait for what follows
        busy |= self._reserve_then_move()
        busy |= self._rebalance()
        busy |= self._handoffs.pump()  # else it would wait for the step that is dispatched next
        busy |= self._dispatch_prefill()
        self._give_back()
        busy |= self._handoffs.pump()
        self._idle_turns = 0 if busy or self._roster.has_news else self._idle_turns + 1
        if self._idle_turns:
            self._clock.idle(self._idle_turns)
        return self._roster.take_news()

    # The parts of a step, in its order. Each returns whether it changed anything.

    def _serve_decode(self) -> bool:
        busy = self._harvest_decode()
        busy |= self._land_transfers()
        return busy | self._dispatch_decode()

    def _between_groups(self) -> None:
        self._serve_decode()
        if self.on_news is not None and self._roster.has_news:
            self.on_news(self._roster.take_news())

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
                self._prefilling.harvest(lane, done)
                busy = True
        return busy

    def _reserve_then_move(self) -> bool:
        if not self._roster.prefilled:
            return False
        views = [decode_view(lane) for lane in self._decode]
        admissions = self._decode_scheduler.admit(self._roster.prefilled, views)
        begun = False
        for admission in admissions:
            sequence, target = admission.sequence, self._decode[admission.engine]
            if sequence.state is State.PREFILLED and self._handoffs.fits(sequence, target):
                self._handoffs.begin(sequence, self._prefill[sequence.engine], target)
                begun = True
        return begun

    def _rebalance(self) -> bool:
        if not self._config.handoff.rebalance or self._roster.prefilled or self._handoffs.migrating:
            return False
        views = [decode_view(lane) for lane in self._decode]
        decoding = {lane.index: lane.sequences for lane in self._decode}
        migrations = self._handoff_scheduler.migrations(views, decoding)
        begun = False
        for migration in migrations:
            sequence, target = migration.sequence, self._decode[migration.engine]
            if sequence.state is State.DECODING and self._handoffs.fits(sequence, target):
                self._handoffs.migrate(sequence, self._decode[sequence.engine], target)
                begun = True
        return begun

    def _give_back(self) -> None:
        """Not as soon as they end: a step may be in the middle of being planned and dispatched."""
        ended, self._ended = self._ended, []
        for sequence, lane in ended:
            self._handoffs.give_back(sequence, lane, self._prefill[sequence.home])

    def _dispatch_prefill(self) -> bool:
        if not self._roster.waiting and not any(lane.running for lane in self._prefill):
            return False
        lookahead = self._config.prefill.lookahead
        views = [prefill_view(lane, self._decode, lookahead) for lane in self._prefill]
        plans = self._prefill_scheduler.plan(self._roster.waiting, views)
        for plan in plans:
            self._prefilling.dispatch(self._prefill[plan.engine], plan.chunks)
        return bool(plans)

    # Decode.

    def _grow(self, lane: DecodeLane) -> None:
        """See that everybody who enters has a page for the position that he writes."""
        needy = lane.pipeline.needy()
        if len(needy) > lane.allocator.free_pages:
            self._handoffs.withdraw(lane)
        while needy:
            holders = self._roster.holders(lane)
            plan = self._decode_scheduler.grow(needy, holders, lane.allocator.free_pages)
            for victim in plan.victims:
                self._roster.preempt(victim)
            # A victim's pages may be somebody else's, too: then there are fewer than planned.
            for sequence in plan.grown[: lane.allocator.free_pages]:
                if sequence.state is State.DECODING:
                    sequence.pages += lane.allocator.allocate(1)
            needy = lane.pipeline.needy()

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
        sampled = read(done, self._roster)
        if sampled is None:
            return
        for sequence in self._roster.accept(tick.leaving, sampled):
            if self._handoff_scheduler.gives_back(sequence):
                self._ended.append((sequence, lane))

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
        todo = warm_ups(
            self._prefill,
            self._decode,
            self._transfer,
            self.buckets,
            self._config.handoff,
            self._recorder,
        )
        for warm_up in show(todo):
            warm_up()
        return len(todo)

    def check(self) -> None:
        """Assert that every page and row is free, or held by exactly those who are known."""
        held = self._roster.pages_held()
        for handoff in self._handoffs.open:
            for holder, pages in handoff.held():
                held[holder.allocator] += pages
        for allocator, pages in held.items():
            allocator.check(pages)
        lanes: list[Lane] = [*self._prefill, *self._decode]
        for pool in {id(lane.pool): lane.pool for lane in lanes}.values():
            if pool.prefixes is not None:
                pool.prefixes.check()
        for lane in self._decode:
            coming = sum(h.target is lane and h.row >= 0 for h in self._handoffs.open)
            taken = lane.pipeline.taken_rows
            assert taken == len(lane.sequences) + coming, f"decode/{lane.index}: rows leaked"


def _take_ready(in_flight: deque[InFlight[WorkT, Any]]) -> Iterator[InFlight[WorkT, Any]]:
    """Take out those at the front that have come back; an engine works in order."""
    while in_flight and is_ready(in_flight[0].ticket):
        yield in_flight.popleft()
