"""Engines that are out of service, and others that do their work meanwhile."""

import logging
from collections.abc import Callable
from math import inf

from pdjax.core.roles import Role
from pdjax.host.engines import EngineState
from pdjax.host.fleet import Fleet
from pdjax.host.health import Health
from pdjax.host.roles.coverage import Coverage, reaches
from pdjax.host.roles.drains import Drains
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.sequence import Sequence
from pdjax.host.service import Outage

_LOG = logging.getLogger("pdjax")

_SIDES = Role.PREFILL, Role.DECODE


class NoHealthyEngine(RuntimeError):
    """No engine in service does what a request needs."""


class Outages:
    """The engines that are out of service.

    Args:
      fleet: the engines.
      lifecycle: sends sequences elsewhere, or ends them.
      health: says for how long an engine goes.
      coverage: says what others do.
      drains: end when an engine goes.
      runtime: events, clock and recorder.
      tell: called when what an engine is given has changed.
      ask_at: called with moments at which an engine is to be tried again.
      change: lets an engine have another role, for a reason.

    Attributes:
      under_way: the engines.
      unserved: why sequences cannot go on, if so.
    """

    def __init__(
        self,
        fleet: Fleet,
        lifecycle: SequenceLifecycle,
        health: Health,
        coverage: Coverage,
        drains: Drains,
        runtime: Runtime,
        tell: Callable[[EngineState], None],
        ask_at: Callable[[float], None],
        change: Callable[[EngineState, Role, str], None],
    ) -> None:
        self._fleet, self._lifecycle, self._health = fleet, lifecycle, health
        self._coverage, self._drains = coverage, drains
        self._clock, self._recorder = runtime.clock, runtime.recorder
        self._tell, self._ask_at, self._change = tell, ask_at, change
        self.unserved: str | None = None
        # What an error has broken off goes on.
        self.under_way = [state for state in fleet if state.service.outage is not None]

    def fail(self, state: EngineState, cause: str) -> None:
        """Put an engine out of service whose steps fail: all that it has starts over elsewhere.
        One without a substitute stays for as long as there is hope."""
        if state.service.outage is not None:
            return
        if self._coverage.without(state) is not None and not self._health.is_hopeless(state):
            return
        now = self._clock.now()
        seconds = self._health.outage_seconds(state)
        self.put_out(state, Outage(cause, now, now + seconds, failed=True))
        self._drains.evict(state, sound=False)
        for sequence in self._handed_out_by(state):
            self._lifecycle.preempt(sequence, sound=False)

    def put_out(self, state: EngineState, outage: Outage) -> None:
        """Put an engine out of service, as it is."""
        service = state.service
        drain = service.drain
        self._drains.leave(state, service.role if drain is None else drain.to or service.role)
        service.outage, service.stands_in = outage, None
        self.under_way.append(state)
        self._recorder.went_out(state.id)
        _LOG.warning("%s: out of service: %s", state.id, outage.cause)
        self._ask_at(outage.until)
        self._stand_in()
        self._tell(state)

    def try_again(self) -> bool:
        """Take back the engines whose time out of service is over; returns whether there are
        any."""
        now = self._clock.now()
        due = [
            state
            for state in self.under_way
            if state.service.outage is not None and state.service.outage.until <= now
        ]
        for state in due:
            self.take_back(state)
        return bool(due)

    def take_back(self, state: EngineState) -> None:
        """Let an engine serve again, and those that stand in for it go back to their roles."""
        outage = state.service.outage
        assert outage is not None, f"{state.id} is in service"
        self.under_way.remove(state)
        self._recorder.came_back(state.id, outage.since, outage.cause)
        self._health.recovered(state)
        _LOG.info("%s: in service again", state.id)
        self._tell(state)
        self._stand_down()

    # Others do its work.

    def _stand_in(self) -> None:
        """Where the engines in service do not do all that requests need, let others do it, too:
        those that can, else those that are out of service since they are slow."""
        for state in self._fleet:
            service, missing = state.service, self._coverage.lacking()
            if missing is None:
                return
            if service.outage or not self._coverage.would_help(state):
                continue
            if service.stands_in is None:
                drain = service.drain
                service.stands_in = service.role if drain is None else drain.to or service.role
            self._drains.leave(state, service.role)
            service.role = Role.MIXED
            _LOG.warning("%s: stands in, since %s", state.id, missing)
            self._tell(state)
        for state in list(self.under_way):
            outage = state.service.outage
            slow = outage is not None and not outage.failed and outage.until < inf
            if slow and self._coverage.lacking() is not None:
                self.take_back(state)

    def _stand_down(self) -> None:
        """Let engines that stand in go back to their roles, as far as others do the work."""
        for side in _SIDES:
            own = [each.service.stands_in or each.role for each in self._coverage.gives(side)]
            if not any(role.includes(side) for role in own):
                return
        for state in self._fleet:
            role = state.service.stands_in
            if role is not None and self._coverage.missing(state, role) is None:
                state.service.stands_in = None
                self._change(state, role, "others do again what it stood in for")

    def cut_off(self) -> None:
        """Give no prompts to engines whose KV has no way to an engine that decodes; what they have
        starts over elsewhere."""
        ends = self._fleet.for_rows
        for state in self._fleet.prefill:
            was, is_now = state.service.cut_off, not reaches(state, ends)
            state.service.cut_off = is_now
            if was != is_now:
                self._fleet.touch(state)
            if is_now and not was:
                for sequence in [*state.running, *self._handed_out_by(state)]:
                    self._lifecycle.preempt(sequence)

    def _handed_out_by(self, state: EngineState) -> list[Sequence]:
        """The sequences that an engine has prefilled, and that wait for room to decode."""
        return [each for each in self._lifecycle.prefilled if each.engine == state.id]

    # Where no engine can.

    def find_unserved(self) -> None:
        """See whether all sequences can go on."""
        self.unserved = None
        if self.under_way and (missing := self._coverage.lacking()) is not None:
            causes = (f"{each.id}: {each.service.cause}" for each in self.under_way)
            self.unserved = f"{missing}; {'; '.join(causes)}"

    def fail_unserved(self) -> bool:
        """End the sequences that no engine would serve, since none has room or none is there;
        returns whether there are any."""
        if self.unserved is None:
            return False
        lifecycle = self._lifecycle
        prompts, rows = (
            _largest(self._coverage.gives(side)) for side in (Role.PREFILL, Role.DECODE)
        )
        lost = [
            *(each for each in lifecycle.waiting if each.lifetime_tokens > min(prompts, rows)),
            *(each for each in lifecycle.held if each.lifetime_tokens > min(prompts, rows)),
            *(each for each in lifecycle.prefilled if each.lifetime_tokens > rows),
        ]
        for sequence in lost:
            lifecycle.fail(sequence, NoHealthyEngine(self.unserved))
        return bool(lost)


def _largest(engines: list[EngineState]) -> int:
    """Tokens of the largest pool; 0 where there is no engine."""
    return max((state.pool.tokens for state in engines), default=0)
