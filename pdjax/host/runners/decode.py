"""Ticks: the sequences that enter, and what comes back."""

from collections.abc import Iterable

from pdjax.host.batching.decode_pipeline import Tick
from pdjax.host.batching.prefill_batch import history
from pdjax.host.engines import EngineState, InFlight
from pdjax.host.fleet import Fleet
from pdjax.host.handoff.manager import HandoffManager
from pdjax.host.policies.api import DecodePolicy
from pdjax.host.policies.check import check_growth
from pdjax.host.runners.harvest import read
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.output import OutputProcessor
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.steps import DecodeStep, StepKind


class DecodeRunner:
    """Dispatches and harvests ticks.

    Args:
      fleet: the engines.
      lifecycle, handoffs: move sequences, and give up room that is held ahead.
      output: gives sequences their tokens.
      policy: says which sequences give way when pages run out.
      runtime: events, clock and recorder.
    """

    def __init__(
        self,
        fleet: Fleet,
        lifecycle: SequenceLifecycle,
        handoffs: HandoffManager,
        output: OutputProcessor,
        policy: DecodePolicy,
        runtime: Runtime,
    ) -> None:
        self._fleet, self._lifecycle, self._handoffs = fleet, lifecycle, handoffs
        self._output, self._policy, self._events = output, policy, runtime.events
        self._clock, self._recorder = runtime.clock, runtime.recorder

    def dispatch(self, states: Iterable[EngineState]) -> bool:
        """Give a tick to each engine that has something to do and few steps in flight. Returns
        whether there was any."""
        busy = False
        for state in states:
            if not state.can_tick:
                continue
            busy, rows = True, state.rows
            rows.align()
            needing = rows.needing_page()
            if needing:
                self._grow(state, needing)
            joining = rows.joining()
            if joining:
                self._let_in(state, joining)
            # Where rows grow or join, it may be that every sequence had to give way, or failed.
            if not (needing or joining) or rows.active:
                self._submit(state, rows.tick())
        return busy

    def _grow(self, state: EngineState, needing: list[Sequence]) -> None:
        """Allocate a page for each entering row that needs one; preempt if none is free."""
        if len(needing) > state.allocator.free_pages:
            missing = len(needing) - state.allocator.free_pages
            self._handoffs.give_up_room(state.pool, missing)
        while needing:
            holders, free = self._lifecycle.holders(state.pool), state.allocator.free_pages
            plan = self._policy.grow(needing, holders, free, self._clock.now())
            check_growth(self._policy, plan, needing, holders, free)
            for victim in plan.victims:
                self._lifecycle.preempt(victim)
            # A victim may have shared its pages: then fewer are free than the plan counted on.
            for sequence in plan.grown[: state.allocator.free_pages]:
                if sequence.state is State.DECODING:
                    sequence.pages += state.allocator.allocate(1)
            needing = state.rows.needing_page()

    def _let_in(self, state: EngineState, joining: list[Sequence]) -> None:
        """Note the sequences that enter for the first time, and upload the token histories of those
        that use penalties; feed rows that run ahead. Not before they enter: until then the device
        may still sample for the row's last sequence."""
        for sequence in joining:
            try:
                handoff = sequence.handoff
                if handoff is not None and handoff.ahead:
                    state.engine.feed(handoff.row, *handoff.chooses)
                    continue
                self._recorder.mark(sequence, "first_tick")
                if sequence.request.params.penalized:
                    tokens = history(sequence.token_ids, state.buckets)
                    state.engine.set_history(sequence.row, tokens)
            except Exception as error:
                self._lifecycle.fail(sequence, error)

    def _submit(self, state: EngineState, tick: Tick) -> None:
        started = self._clock.now()
        try:
            ticket = state.engine.submit(DecodeStep(tick.batch))
        except BaseException as error:
            # An interrupt, too, leaves open how far the device has come.
            self._fleet.touch(state)
            self._lifecycle.fail_all(tick.refs, error)
            if not isinstance(error, Exception):
                raise
        else:
            state.in_flight.append(InFlight(StepKind.DECODE, tick, ticket, started, tick.refs))
            self._events.watch(ticket, state.step_done, state.id)
            self._fleet.stepped(state)
            active = len(tick.refs)
            self._recorder.observer.step_submitted(
                state.id, StepKind.DECODE, active, active, started
            )

    def harvest(self, state: EngineState, done: InFlight[Tick]) -> list[Sequence]:
        """A tick has come back: each row that leaves has its sequence's next token. Returns the
        sequences that have finished."""
        tick, now, rows = done.work, self._clock.now(), state.rows
        active = len(tick.refs)
        self._recorder.span(
            state.id,
            "tick",
            done.started,
            now,
            rows_active=active,
            rows=rows.rows,
            stages_active=tick.stages_active,
            stages=rows.stages,
            who=tick.ids,
        )
        self._recorder.free_pages(state.pool.id, state.allocator.free_pages)
        self._recorder.observer.step_done(
            state.id, StepKind.DECODE, active, active, done.started, now
        )
        sampled = read(done, self._lifecycle)
        if sampled is None:
            return []
        state.time(done, active, now)
        return self._output.accept(tick.leaving, sampled)
