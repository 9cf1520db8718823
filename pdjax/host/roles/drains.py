"""Engines that end what they will not do afterwards."""

import logging
from collections.abc import Callable
from dataclasses import replace

from pdjax.core.roles import Role
from pdjax.host.engines import EngineState
from pdjax.host.fleet import Fleet
from pdjax.host.handoff.handoff import Purpose
from pdjax.host.handoff.manager import HandoffManager
from pdjax.host.policies.api import DecodePolicy
from pdjax.host.policies.check import check_admissions
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.sequence import Sequence, age
from pdjax.host.service import Drain

_LOG = logging.getLogger("pdjax")


class Drains:
    """The drains under way.

    Args:
      fleet: the engines.
      lifecycle, handoffs: move sequences, and their KV.
      policy: finds room for sequences that decode on an engine that drains.
      runtime: clock and recorder.
      tell: called when what an engine is given has changed.
      put_out: called when an engine has drained that goes out of service.

    Attributes:
      under_way: the engines that drain.
    """

    def __init__(
        self,
        fleet: Fleet,
        lifecycle: SequenceLifecycle,
        handoffs: HandoffManager,
        policy: DecodePolicy,
        runtime: Runtime,
        tell: Callable[[EngineState], None],
        put_out: Callable[[EngineState, Drain], None],
    ) -> None:
        self._fleet, self._lifecycle, self._handoffs = fleet, lifecycle, handoffs
        self._policy, self._clock, self._recorder = policy, runtime.clock, runtime.recorder
        self._tell, self._put_out = tell, put_out
        # What an error has broken off goes on.
        self.under_way = [state for state in fleet if state.service.drain is not None]

    def begin(self, state: EngineState, drain: Drain) -> None:
        """Let an engine drain. One that drains already goes on to what the new drain leads to."""
        service, before = state.service, state.service.drain
        if drain.to is service.role:
            if before is not None:
                self.end(state, service.role)
            return
        if before is None:
            self.under_way.append(state)
        else:
            drain = replace(drain, since=before.since)
        service.drain = drain
        goal = "out of service" if drain.to is None else drain.to.value
        _LOG.info("%s: drains to be %s: %s", state.id, goal, drain.cause)
        if service.drops_rows:
            self._withdraw(state)
        self._tell(state)
        if self._is_drained(state):
            self._finish(state)

    def _withdraw(self, state: EngineState) -> None:
        """Give up the room that is held ahead on an engine."""
        for handoff in self._handoffs.open:
            if handoff.engine is state and handoff.departed is None and not handoff.ahead:
                handoff.withdraw()

    def go_on(self) -> bool:
        """Move away what can move, and let engines change that have nothing left. Returns whether
        anything changed."""
        busy = False
        for state in list(self.under_way):
            drain = state.service.drain
            assert drain is not None, f"{state.id} does not drain"
            if self._clock.now() >= drain.deadline:
                self.evict(state, sound=True)
                busy = True
            elif state.service.drops_rows and state.decoding:
                busy |= self._migrate(state)
            if self._is_drained(state):
                self._finish(state)
                busy = True
        return busy

    def _is_drained(self, state: EngineState) -> bool:
        """Whether nothing is left of what an engine will not do afterwards."""
        service, drain = state.service, state.service.drain
        assert drain is not None, f"{state.id} does not drain"
        if service.drops_prompts and state.running:
            return False
        if service.drops_rows and state.pipeline is not None and state.pipeline.taken_rows:
            return False
        return service.role.common(drain.to) is not None or not state.in_flight

    def _migrate(self, state: EngineState) -> bool:
        """Let the sequences that decode on an engine go on elsewhere, as far as the decode policy
        finds room. Returns whether any does."""
        able = sorted((each for each in state.decoding if each.streams), key=age)
        targets = self._fleet.for_rows
        if not able or not targets:
            return False
        views, moved = self._fleet.views(targets), False
        plan = self._policy.admit(able, views, self._clock.now())
        check_admissions(self._policy, plan, able, views)
        for admission in plan:
            target = self._fleet.engines[admission.engine]
            if self._handoffs.fits(admission.sequence, target):
                self._move(admission.sequence, state, target)
                moved = True
        return moved

    def _move(self, sequence: Sequence, state: EngineState, target: EngineState) -> None:
        """Let a sequence go on on another engine; of the same pool it changes its row alone."""
        if target.pool is not state.pool:
            self._handoffs.migrate(sequence, target)
            return
        row, pages = target.rows.reserve(), self._lifecycle.leave_row(sequence)
        self._lifecycle.start_decoding(sequence, target, row, pages)

    def evict(self, state: EngineState, *, sound: bool) -> None:
        """Send all that an engine still has of what it will not do back to the queue.

        Args:
          sound: whether its KV is right.
        """
        service, preempt = state.service, self._lifecycle.preempt
        if service.drops_rows:
            self._withdraw(state)
            for handoff in self._handoffs.open:
                if handoff.engine is state and handoff.purpose is not Purpose.CACHE:
                    preempt(handoff.sequence, sound=sound)
            for sequence in list(state.decoding):
                preempt(sequence, sound=sound)
        if service.drops_prompts:
            for sequence in list(state.running):
                preempt(sequence, sound=sound)

    def _finish(self, state: EngineState) -> None:
        """An engine has drained."""
        drain = state.service.drain
        assert drain is not None, f"{state.id} does not drain"
        if drain.to is not None:
            self.end(state, drain.to)
        else:
            self._put_out(state, drain)

    def end(self, state: EngineState, role: Role) -> None:
        """Let an engine that has drained, or need not, have a role."""
        self.leave(state, role)
        self._tell(state)

    def leave(self, state: EngineState, role: Role) -> None:
        """An engine drains no more, whatever it does then."""
        service, drain, now = state.service, state.service.drain, self._clock.now()
        if drain is None:
            return
        self.under_way.remove(state)
        goal = "out of service" if drain.to is None else drain.to.value
        self._recorder.drained(state.id, f"draining to be {goal}", drain.since, drain.cause)
        if role is not service.role:
            self._recorder.changed_role(state.id)
            _LOG.info("%s: is %s after %.3f s", state.id, role.value, now - drain.since)
        service.drain, service.role = None, role
