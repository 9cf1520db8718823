"""Steps on their way to engines, and what comes back of them."""

from collections.abc import Callable

from pdjax.host.engines import EngineState, InFlight, Work
from pdjax.host.fleet import Fleet
from pdjax.host.health import Health
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.reference import SequenceRef, current
from pdjax.interfaces.batches import Sampled
from pdjax.interfaces.engine import StepTicket
from pdjax.interfaces.steps import Step, StepKind


class Steps:
    """Gives steps to engines, and reads them.

    Args:
      fleet: the engines.
      lifecycle: lets the sequences of a step fail with it, or start over elsewhere.
      health: counts the steps of an engine that fail.
      runtime: events, clock and recorder.
    """

    def __init__(
        self, fleet: Fleet, lifecycle: SequenceLifecycle, health: Health, runtime: Runtime
    ) -> None:
        self._fleet, self._lifecycle, self._health = fleet, lifecycle, health
        self._events = runtime.events
        self._clock, self._recorder = runtime.clock, runtime.recorder

    def submit(
        self,
        state: EngineState,
        step: Step,
        work: Work,
        refs: tuple[SequenceRef, ...],
        *,
        tokens: int,
        sequences: int,
        started: float | None = None,
        scored: tuple[range, ...] = (),
        on_error: Callable[[BaseException], None] = lambda error: None,
    ) -> StepTicket | None:
        """Give a step to an engine; None where it has failed, and the sequences of `refs` with it.

        Args:
          tokens, sequences: that it computes, for an observer.
          started: when its dispatch began, where that is not now: before what leaves with it was
            sent.
          scored: see `InFlight`.
          on_error: is told the error.
        """
        started = self._clock.now() if started is None else started
        try:
            ticket = state.engine.submit(step)
        except BaseException as error:
            # An interrupt, too, leaves open how far the device has come.
            self._fleet.touch(state)
            self._fail(state, step.kind, refs, error, started)
            on_error(error)
            if not isinstance(error, Exception):
                raise
            return None
        state.in_flight.append(
            InFlight(step.kind, work, ticket, started, refs, state.steps, scored)
        )
        self._events.watch(ticket, state.step_done, state.id)
        self._fleet.stepped(state)
        self._recorder.observer.step_submitted(state.id, step.kind, tokens, sequences, started)
        return ticket

    def read(
        self, state: EngineState, done: InFlight, *, tokens: int, sequences: int
    ) -> Sampled | None:
        """The tokens of a step that has come back; None where it has failed, and its sequences
        with it."""
        now = self._clock.now()
        self._recorder.free_pages(state.pool.id, state.allocator.free_pages)
        self._recorder.observer.step_done(state.id, done.kind, tokens, sequences, done.started, now)
        try:
            sampled = done.ticket.result()
        except BaseException as error:
            self._fail(state, done.kind, done.refs, error, done.started)
            if not isinstance(error, Exception):
                raise
            return None
        if state.time(done, tokens, now):
            self._fleet.newly_measured = True
        self._health.worked(state)
        return sampled

    def _fail(
        self,
        state: EngineState,
        kind: StepKind,
        refs: tuple[SequenceRef, ...],
        error: BaseException,
        started: float,
    ) -> None:
        """A step has failed, and its sequences with it; but they start over where another engine
        can serve them, unless the error was meant for the program, as Ctrl-C is. Where one of them
        has failed on another engine, too, it may be what is wrong, and the engine is not blamed."""
        health, again, sequences = self._health, 0, list(current(refs))
        if isinstance(error, Exception):
            if not any(sequence.failed_on - {state.id} for sequence in sequences):
                health.failed(state, error, started)
            again = health.most_attempts if health.is_served_elsewhere(state, kind) else 0
        for sequence in sequences:
            if sequence.failed_steps < again:
                sequence.failed_steps += 1
                sequence.failed_on |= {state.id}
                self._lifecycle.preempt(sequence, sound=False)
            else:
                self._lifecycle.fail(sequence, error)
