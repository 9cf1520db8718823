"""Takes requests through the system: the front of the loop, for sessions.

A sequence waits in the queue; is prefilled, whole or in chunks, in pages reserved for all of it;
has its first token read; waits for a row and pages on the decode side, which are reserved before
anything moves (where there is room, they are reserved ahead, and KV leaves as it is computed); is
transferred; and decodes until it ends, or until it must give its pages to an older one and starts
again from the queue with what it has written so far. It may be aborted anywhere on this way.

The coordinator knows neither jax nor wall time, so the same loop drives real meshes, fakes in
tests, and simulated engines.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from itertools import count

from pdjax.config import Config
from pdjax.core.clock import Clock
from pdjax.core.ids import EngineId
from pdjax.core.recompute import RecomputeCost
from pdjax.core.request import QueueFull, Request
from pdjax.core.roles import Role
from pdjax.host.engines import EngineState
from pdjax.host.loop import Loop
from pdjax.host.metrics.observer import Observer, TurnPart
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.policies.api import Policies
from pdjax.host.policies.registry import make_policies
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.constraint import Constraint, SequenceGuide
from pdjax.host.sequences.guide_threads import GuideThreads
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.limits import Limits, choices
from pdjax.host.sequences.news import Progress
from pdjax.host.sequences.sequence import Sequence, SequenceText, State
from pdjax.host.service import services_of
from pdjax.host.warm_up import Show
from pdjax.interfaces.engine import Engine
from pdjax.interfaces.events import EventSource
from pdjax.interfaces.transport import Pool, Transport

_LOG = logging.getLogger("pdjax")


class Coordinator:
    """Takes requests through prefill, hand-off and decode; call `step` while it `has_work`.

    Args:
      config: bounds and budgets.
      vocab_size: token ids are below it.
      max_model_len: tokens of prompt and output together.
      end_token_ids: tokens with which the model ends an answer.
      engines: at least one that accepts prefill steps, and one that accepts decode steps.
      transport: moves pages between their pools.
      events: tells what has happened.
      clock, recorder: tell the time, and take down what happened when.
      policies: decide; None takes those that the config names.
      make_text: makes the text of each sequence of a request; None makes no text.
      make_guide: follows the form that each sequence of a request must have; None where it has
        none.
      guides: follow those forms beside the turns; None follows them within a turn.
      pools: that no engine has; the transport connects them to others.
      roles: what engines are given to do at the start; any that is not named does all that it
        accepts.
      recompute: what it takes to compute KV again, for policies that go by it; None where it is not
        known.

    Attributes:
      loop: the turns, and the state of engines, pools and sequences; `start_over` makes another.

    Raises:
      ValueError: engines or buckets that do not fit together, or no such policy.
    """

    def __init__(
        self,
        config: Config,
        *,
        vocab_size: int,
        max_model_len: int,
        end_token_ids: Iterable[int],
        engines: Seq[Engine],
        transport: Transport,
        events: EventSource,
        clock: Clock,
        recorder: Recorder,
        policies: Policies | None = None,
        make_text: Callable[[Request], SequenceText | None] | None = None,
        make_guide: Callable[[Request], SequenceGuide | None] | None = None,
        guides: GuideThreads | None = None,
        pools: Seq[Pool] = (),
        roles: Mapping[EngineId, Role] | None = None,
        recompute: RecomputeCost | None = None,
    ) -> None:
        self._config, self._max_model_len = config, max_model_len
        self._engines, self._transport = engines, transport
        self._make_text, self._make_guide = make_text, make_guide
        self._pools, self._services = pools, services_of(engines, roles)
        self._policies = policies or make_policies(config)
        eviction = self._policies.eviction if config.kv.prefix_cache else None
        orders = None if eviction is None else lambda layout: eviction.order(layout, recompute)
        self._runtime = Runtime(events, clock, recorder, guides, orders)
        self._end_token_ids = frozenset(end_token_ids)
        self._numbers = count(1)  # of transfer jobs
        self._submitted, self._paused = 0, set[EngineId]()
        self._has_stalled = False
        self._broken: SequenceLifecycle | None = None  # not taken over: interrupted
        self.loop = self._new_loop()
        most = config.max_logprobs, config.max_waiting
        tokens = self.loop.fleet.longest(local=self._policies.placement.local)
        pinned = self.loop.fleet.longest_pinned
        self._limits = Limits(vocab_size, max_model_len, *most, *tokens, pinned)

    def _new_loop(self) -> Loop:
        loop = Loop(
            self._config,
            self._engines,
            self._transport,
            self._policies,
            self._runtime,
            self._max_model_len,
            self._end_token_ids,
            self._numbers,
            self._pools,
            self._services,
        )
        for name in self._paused:
            loop.fleet.engines[name].paused = True
        return loop

    def start_over(self, error: BaseException) -> None:
        """Take every live sequence back to the queue, since `error` has broken off a turn, or
        another call, at an unknown place.

        What is half done then can't be told from what is done. So no account of pages, rows and
        hand-offs outlives it, nor any prefix; sequences lose their KV and compute it again. Results
        of work in flight are dropped: engines work in order, so that it is done before anything
        that is dispatched from now on.
        """
        self._broken = self._broken or self.loop.lifecycle
        self._runtime.events.forget()
        self.loop.handoffs.queue.abandon()
        self.loop.tiers.moves.abandon()
        self.loop = self._new_loop()
        self.loop.lifecycle.take_over(self._broken, error)
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

    @property
    def most_kv(self) -> int:
        """Tokens of the longest sequence whose KV has room in the pools that it goes through."""
        return min(self._limits.prefill_tokens, self._limits.decode_tokens)

    def has_room(self, choices: int) -> bool:
        """Whether the waiting queue has room for so many more sequences."""
        lifecycle = self.loop.lifecycle
        queued = sum(map(len, (lifecycle.waiting, lifecycle.held, lifecycle.loading)))
        return queued + choices <= self._limits.max_waiting

    def check_room(self, choices: int, arriving: int = 0) -> None:
        """Refuse so many more sequences if the waiting queue has no room for them, and for those
        that are `arriving`.

        Raises:
          QueueFull: saying how many wait.
        """
        if not self.has_room(arriving + choices):
            raise QueueFull(
                f"{len(self.loop.lifecycle.waiting) + arriving} sequences wait already; "
                f"n={choices} more do not fit into a queue of "
                f"max_waiting={self._limits.max_waiting}"
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

    def sequences_of(self, request: Request, *, makes_text: bool = True) -> list[Sequence]:
        """The choices of a request that has been checked, younger than all before; not queued
        yet. Without text the stop strings of the request are the caller's to find: see `stop`.

        Raises:
          ValueError: no token may be chosen.
        """
        sequences = choices(request, self._limits, self._submitted, self._config.seed)
        if self._make_text is not None and makes_text:
            for sequence in sequences:
                sequence.text = self._make_text(request)
        if request.params.constrained:
            self._constrain(request, sequences)
        self._submitted += len(sequences)
        return sequences

    def _constrain(self, request: Request, sequences: list[Sequence]) -> None:
        """Give each choice its constraint: the first mask of all is the same."""
        make = self._make_guide or (lambda _: None)
        first, *others = sequences
        size, ends = self._limits.vocab_size, self._end_token_ids
        first.constraint = Constraint(request.params, make(request), size, ends)
        for sequence in others:
            sequence.constraint = first.constraint.again(make(request))

    def enqueue(self, sequences: list[Sequence]) -> None:
        """Queue all choices of a request, whether the queue has room or not."""
        self._recover()
        try:
            self.loop.lifecycle.add(sequences[0].request, sequences)
        except BaseException as error:
            self.start_over(error)
            raise

    def is_live(self, request_id: str) -> bool:
        """Whether the request has been queued and has not ended."""
        self._recover()
        return request_id in self.loop.lifecycle.live

    def abort(self, request_id: str) -> bool:
        """End a request, wherever its sequences are. Returns whether there was anything to end."""
        self._recover()
        sequences = list(self.loop.lifecycle.live.get(request_id, ()))
        try:
            for sequence in sequences:
                self.loop.lifecycle.end(sequence, State.ABORTED, "abort")
        except BaseException as error:
            self.start_over(error)
            raise
        return bool(sequences)

    def stop(self, request_id: str, choice: int, tokens: int, stop: str) -> None:
        """End a choice whose first `tokens` tokens of output have completed the stop string `stop`,
        wherever it is; those that came after them are dropped. One that has ended is left as it
        is."""
        self._recover()
        for sequence in list(self.loop.lifecycle.live.get(request_id, ())):
            if sequence.choice == choice:
                try:
                    self.loop.lifecycle.stop(sequence, tokens, stop)
                except BaseException as error:
                    self.start_over(error)
                    raise

    def wake(self) -> None:
        """End the wait of a `step` that has nothing to do. Any thread may call this, and so may a
        signal handler or a finaliser."""
        self._runtime.events.wake()

    def pause(self, engine: EngineId) -> None:
        """Dispatch no tick to an engine until it is resumed. What is in flight comes back, and
        hand-offs go on.

        Raises:
          ValueError: no such engine.
        """
        self._set_paused(engine, paused=True)

    def resume(self, engine: EngineId) -> None:
        """Undo `pause`.

        Raises:
          ValueError: no such engine.
        """
        self._set_paused(engine, paused=False)

    def set_role(self, engine: EngineId, role: Role | None) -> None:
        """Let an engine prefill, decode, or do both, from when it has drained; None puts it out of
        service, until it has a role again. See `host/roles/`.

        Raises:
          ValueError: no such engine; it does not accept the role's steps; or no other engine in
            service would do what it leaves out.
        """
        self._recover()
        state = self._state(engine)
        try:
            self.loop.roles.set_role(state, role)
        except BaseException as error:
            if not isinstance(error, ValueError):  # refused, before anything is changed
                self.start_over(error)
            raise
        self.wake()

    def _set_paused(self, engine: EngineId, *, paused: bool) -> None:
        state = self._state(engine)
        state.paused = paused
        (self._paused.add if paused else self._paused.discard)(engine)
        self.loop.fleet.touch(state)

    def _state(self, engine: EngineId) -> EngineState:
        state = self.loop.fleet.engines.get(engine)
        if state is None:
            names = ", ".join(map(str, self.loop.fleet.engines))
            raise ValueError(f"engine={engine}: must be one of {names}")
        return state

    @property
    def observer(self) -> Observer:
        """Watches the coordinator's work; an experiment may set its own."""
        return self._runtime.recorder.observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        self._runtime.recorder.observer = observer

    @property
    def has_work(self) -> bool:
        """Whether a step may still do something, or has something to tell."""
        return self._broken is not None or self.loop.has_work

    def step(self) -> list[Progress]:
        """Go once around; returns what is new since the last time. Where there is nothing to do, it
        waits first, though not for long.

        Raises:
          BaseException: what broke the turn off, such as an interrupt; see `start_over`. What is
            new is told by the next turn.
        """
        observer, busy = self.observer, False
        observer.turn_began()
        try:
            self._recover()
            events = self._runtime.events.poll()
            if not events and self.loop.idle:
                self._tell_of_a_stall()
                observer.part_began(TurnPart.WAIT)
                self._runtime.events.wait()
                events = self._runtime.events.poll()
            busy = self.loop.turn(events)
        except BaseException as error:
            self.start_over(error)
            raise
        finally:
            observer.turn_ended(busy)
        return self.take_news()

    def _tell_of_a_stall(self) -> None:
        """Log, once, that a prefill policy lets sequences wait for ever."""
        if self._has_stalled or not self.loop.stalled:
            return
        self._has_stalled = True
        _LOG.warning(
            "%d sequences wait and nothing is under way, but policy %s plans no step; it is asked "
            "again when another request comes",
            len(self.loop.lifecycle.waiting),
            type(self._policies.prefill).__name__,
        )

    def take_news(self) -> list[Progress]:
        """What is new since the last time, as `step` returns it."""
        return self.loop.lifecycle.take_news()

    def warm_up(self, show: Show | None = None) -> int:
        """Compile what every bucket needs, so that nothing is compiled later, and send a batch of
        each through the door.

        To be called before the first request.

        Args:
          show: goes through what there is to do; None shows nothing.

        Returns:
          how many batches there were.
        """
        assert not self.has_work, "a request would have to wait"
        return self.loop.warm_up(show)

    def close(self) -> None:
        """Let go of what is beside the turns, of which none follows."""
        if self._runtime.guides is not None:
            self._runtime.guides.close()

    def check(self) -> None:
        """Assert that every page and row is free, or held by a sequence or hand-off that is
        known."""
        self.loop.check()
