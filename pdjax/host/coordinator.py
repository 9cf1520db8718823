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

from pdjax.config import Config
from pdjax.core.clock import Clock
from pdjax.core.request import QueueFull, Request
from pdjax.host.audit import audit
from pdjax.host.batching.buckets import Buckets
from pdjax.host.engines import DecodeLane, InFlight, Lane, is_ready, make_lanes
from pdjax.host.handoff.manager import Handoffs
from pdjax.host.losses import lose_pool
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.handoff import HandoffRules
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.policies.router import LeastLoaded
from pdjax.host.runners.decode import Decoding
from pdjax.host.runners.prefill import Prefilling
from pdjax.host.sequences.lifecycle import Progress, Roster
from pdjax.host.sequences.limits import Limits, choices
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.host.views import decode_view, prefill_view
from pdjax.host.warm_up import WarmUp, warm_ups
from pdjax.interfaces.engine import DecodeEngine, PrefillEngine
from pdjax.interfaces.transfer import Transfer

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
        self._engines = prefill_engines, decode_engines
        self._config, self._make_text, self._end_token_ids = config, make_text, end_token_ids
        self._transfer, self._clock, self._recorder = transfer, clock, recorder
        router = LeastLoaded()
        self._prefill_scheduler = FcfsPrefill(self.buckets, config.prefill.token_budget, router)
        self._decode_scheduler = FcfsDecode(self.buckets, router)
        self._handoff_scheduler = HandoffRules(config.handoff, self.buckets)
        self.on_news: Callable[[list[Progress]], None] | None = None
        self._submitted = 0
        self._broken: Roster | None = None  # that an interrupt has kept from being taken over
        self._assemble()
        self._limits = Limits(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_logprobs=config.max_logprobs,
            max_waiting=config.max_waiting,
            prefill_tokens=max(lane.allocator.total for lane in self._prefill) * size,
            decode_tokens=max(lane.allocator.total for lane in self._decode) * table_size,
        )

    def _assemble(self) -> None:
        """Lanes whose pages and rows are all free, and what moves sequences between them."""
        config, clock, recorder = self._config, self._clock, self._recorder
        self._prefill, self._decode = make_lanes(
            *self._engines,
            self._transfer,
            config.decode.rows,
            self.buckets,
            prefix_cache=config.kv.prefix_cache,
        )
        self._roster = Roster(self._prefill, self._decode, recorder, self._end_token_ids)
        self._handoffs = Handoffs(
            config.handoff, self._transfer, self._roster, self.buckets, clock, recorder
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
        self._decoding = Decoding(
            self._decode,
            self._roster,
            self._handoffs,
            self._decode_scheduler,
            self.buckets,
            config.decode.lookahead,
            clock,
            recorder,
        )
        self._ended: list[tuple[Sequence, DecodeLane]] = []
        self._idle_turns = 0

    def start_over(self, error: BaseException) -> None:
        """Take every live sequence back to the queue, since `error` has broken off a turn, or
        another call, at an unknown place.

        What is half done then can't be told from what is done. So no account of pages, rows and
        hand-offs outlives it, nor any prefix; sequences lose their KV and compute it again. Results
        of work in flight are dropped: engines work in order, so that it is done before anything
        that is dispatched from now on.
        """
        self._broken = self._broken or self._roster
        self._assemble()
        self._roster.take_over(self._broken, error)
        self._broken = None

    def _recover(self) -> None:
        """Finish a `start_over` that was broken off itself."""
        if self._broken is not None:
            self.start_over(InterruptedError("while starting over"))

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

    def check_room(self, choices: int, arriving: int = 0) -> None:
        """Refuse so many more sequences if the waiting queue has no room for them, and for those
        that are `arriving`.

        Raises:
          QueueFull: saying how many wait.
        """
        if not self.has_room(arriving + choices):
            raise QueueFull(
                f"{len(self._roster.waiting) + arriving} sequences wait already; n={choices} more "
                f"do not fit into a queue of max_waiting={self._limits.max_waiting}"
            )

    def submit(self, request: Request) -> list[Sequence]:
        """Queue a request: all of its choices, or none.

        Raises:
          ValueError: it can never be served, or its id is in use.
          QueueFull: the waiting queue has no room for all its choices.
        """
        if self.is_live(request.id):
            raise ValueError(f"id={request.id!r}: in use by a live request; must be unique")
        self._limits.check(request)
        self.check_room(request.params.n)
        sequences = self.sequences_of(request)
        self.enqueue(sequences)
        return sequences

    def sequences_of(self, request: Request) -> list[Sequence]:
        """The choices of a request that has been checked, younger than all before; not queued
        yet."""
        sequences = choices(request, self._limits, self._submitted, self._config.seed)
        if self._make_text is not None:
            for sequence in sequences:
                sequence.text = self._make_text(request)
        self._submitted += len(sequences)
        return sequences

    def enqueue(self, sequences: list[Sequence]) -> None:
        """Queue all choices of a request, whether the queue has room or not."""
        self._recover()
        try:
            self._roster.arrive(sequences[0].request, sequences)
        except BaseException as error:
            self.start_over(error)
            raise

    def is_live(self, request_id: str) -> bool:
        """Whether the request has been queued and has not ended."""
        self._recover()
        return request_id in self._roster.live

    def abort(self, request_id: str) -> bool:
        """End a request, wherever its sequences are. Returns whether there was anything to end."""
        self._recover()
        sequences = list(self._roster.live.get(request_id, ()))
        try:
            for sequence in sequences:
                self._roster.end(sequence, State.ABORTED, "abort")
        except BaseException as error:
            self.start_over(error)
            raise
        return bool(sequences)

    @property
    def has_work(self) -> bool:
        """Whether a step may still do something, or has something to tell."""
        lanes: list[Lane] = [*self._prefill, *self._decode]
        in_flight = self._handoffs.busy or any(lane.in_flight for lane in lanes)
        told = bool(self._roster.live) or self._roster.has_news
        return in_flight or told or self._broken is not None

    def step(self) -> list[Progress]:
        """Go once around; returns what is new since the last time.

        Raises:
          BaseException: what broke the turn off, such as an interrupt; see `start_over`. What is
            new is told by the next turn.
        """
        try:
            self._recover()
            self._turn()
        except BaseException as error:
            self.start_over(error)
            raise
        if self._idle_turns:
            self._clock.idle(self._idle_turns)
        return self.take_news()

    def take_news(self) -> list[Progress]:
        """What is new since the last time, as `step` returns it."""
        return self._roster.take_news()

    def _turn(self) -> None:
        """Decode goes first, both to be read and to be dispatched, since it is the side whose
        latency is felt with every token."""
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

    # The parts of a step, in its order. Each returns whether it changed anything.

    def _serve_decode(self) -> bool:
        self._notice_losses()
        busy = self._harvest_decode()
        busy |= self._land_transfers()
        return busy | self._dispatch_decode()

    def _between_groups(self) -> None:
        self._serve_decode()
        if self.on_news is not None and self._roster.has_news:
            self.on_news(self._roster.take_news())

    def _notice_losses(self) -> None:
        """Preempt the sequences that have KV in a lost pool, and forget its prefixes."""
        lanes: list[Lane] = [*self._prefill, *self._decode]
        for lane in lanes:
            if lane.losses != lane.engine.losses:
                lane.losses = lane.engine.losses
                lose_pool(lane, self._roster, self._handoffs.open)

    def _take_ready(self, in_flight: deque[InFlight[WorkT, Any]]) -> Iterator[InFlight[WorkT, Any]]:
        """Take out those at the front that have come back; an engine works in order. The sequences
        of what was computed from an empty pool have been preempted when it is handed out."""
        while in_flight and is_ready(in_flight[0].ticket):
            self._notice_losses()
            yield in_flight.popleft()

    def _harvest_decode(self) -> bool:
        busy = False
        for lane in self._decode:
            for done in self._take_ready(lane.in_flight):
                ended = self._decoding.harvest(lane, done)
                self._ended += [(sequence, lane) for sequence in ended]
                busy = True
        return busy

    def _land_transfers(self) -> bool:
        busy = self._handoffs.land()
        self._notice_losses()  # before a sequence decodes from what was gathered of an empty pool
        return self._handoffs.settle() or busy

    def _dispatch_decode(self) -> bool:
        return self._decoding.dispatch()

    def _harvest_prefill(self) -> bool:
        busy = False
        for lane in self._prefill:
            for done in self._take_ready(lane.in_flight):
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
            if self._handoff_scheduler.gives_back(sequence):
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

    def warm_up(self, show: Callable[[list[WarmUp]], Iterable[WarmUp]] = iter) -> int:
        """Send a batch of every bucket through the door, so that nothing is compiled later.

        To be called before the first request.

        Args:
          show: goes through what there is to do, and may show how far it has come.

        Returns:
          how many there were.
        """
        assert not self.has_work, "somebody would have to wait"
        lanes, recorder = (self._prefill, self._decode), self._recorder
        todo = warm_ups(*lanes, self._transfer, self.buckets, self._config.handoff, recorder)
        for warm_up in show(todo):
            warm_up()
        return len(todo)

    def check(self) -> None:
        """Assert that every page and row is free, or held by exactly those who are known."""
        audit(self._prefill, self._decode, self._roster, self._handoffs)
