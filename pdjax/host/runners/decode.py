"""Ticks: the sequences that enter, and what comes back."""

from collections.abc import Iterable

from pdjax.host.batching.decode_pipeline import Tick
from pdjax.host.batching.prefill_batch import history
from pdjax.host.engines import EngineState, InFlight
from pdjax.host.handoff.manager import HandoffManager
from pdjax.host.policies.api import DecodePolicy
from pdjax.host.policies.check import check_growth
from pdjax.host.runners.steps import Steps
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.output import OutputProcessor
from pdjax.host.sequences.sequence import Sequence, State
from pdjax.interfaces.batches import Sampled
from pdjax.interfaces.steps import DecodeStep


class DecodeRunner:
    """Dispatches and harvests ticks.

    Args:
      steps: on their way.
      lifecycle, handoffs: move sequences, and give up room that is held ahead.
      output: gives sequences their tokens.
      policy: says which sequences give way when pages run out.
      runtime: events, clock and recorder.
    """

    def __init__(
        self,
        steps: Steps,
        lifecycle: SequenceLifecycle,
        handoffs: HandoffManager,
        output: OutputProcessor,
        policy: DecodePolicy,
        runtime: Runtime,
    ) -> None:
        self._steps, self._lifecycle, self._handoffs = steps, lifecycle, handoffs
        self._output, self._policy = output, policy
        self._clock, self._recorder = runtime.clock, runtime.recorder

    def dispatch(self, states: Iterable[EngineState]) -> bool:
        """Give a tick to each engine that has something to do and few steps in flight. Returns
        whether there was any."""
        busy = False
        for state in states:
            if not state.can_tick:
                continue
            busy = True
            if self.prepare(state):
                self.submit(state)
        return busy

    def prepare(self, state: EngineState) -> bool:
        """Give the rows that enter the next tick their pages, and let newcomers in. Returns whether
        the tick would do anything then."""
        rows = state.rows
        rows.align()
        needing = rows.needing_page()
        if needing:
            self._grow(state, needing)
        joining = rows.joining()
        if joining:
            self._let_in(state, joining)
        # Where rows grow or join, it may be that every sequence had to give way, or failed.
        return not (needing or joining) or rows.active

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

    def submit(self, state: EngineState) -> None:
        """Give an engine that is prepared its tick."""
        tick = state.rows.tick()
        active = len(tick.refs)
        self._steps.submit(
            state, DecodeStep(tick.batch), tick, tick.refs, tokens=active, sequences=active
        )

    def harvest(self, state: EngineState, done: InFlight[Tick]) -> list[Sequence]:
        """A tick has come back: each row that leaves has its sequence's next token. Returns the
        sequences that have finished."""
        self.record(state, done, self._clock.now())
        active = len(done.work.refs)
        sampled = self._steps.read(state, done, tokens=active, sequences=active)
        return [] if sampled is None else self.take(done, sampled)

    def record(self, state: EngineState, done: InFlight[Tick], now: float) -> None:
        """Note a tick that has come back now."""
        tick, rows = done.work, state.rows
        self._recorder.span(
            state.id,
            "tick",
            done.started,
            now,
            rows_active=len(tick.refs),
            rows=rows.rows,
            stages_active=tick.stages_active,
            stages=rows.stages,
            who=tick.ids,
        )

    def take(self, done: InFlight[Tick], sampled: Sampled) -> list[Sequence]:
        """Give the sequences of a tick their tokens; returns those that have finished."""
        return self._output.accept(done.work.leaving, sampled)
