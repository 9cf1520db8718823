"""Changes of what engines do, while they serve: drain, then change.

    serving -> draining -> serving in another role, or out of service -> serving

An engine that drains is given no more of what it will not do afterwards. Prompts that it has begun
it prefills to their end, and hands over; sequences that decode there move to other engines where
the decode policy finds room, or come to their end. What is left at a deadline starts over
elsewhere, from the queue, with what it has written so far. So nothing is lost, and every token is
the one that it would have been.

An engine whose steps fail goes out of service at once, one that is slow when it has drained. Both
are tried again later. If no other engine does what one of them did, engines that accept its steps
stand in for it; where none can, requests fail with the reason instead of waiting.
"""

from math import inf

from pdjax.config import RolesConfig
from pdjax.core.roles import Role
from pdjax.host.engines import EngineState
from pdjax.host.fleet import Fleet
from pdjax.host.handoff.manager import HandoffManager
from pdjax.host.health import Health
from pdjax.host.policies.api import Policies
from pdjax.host.policies.check import check_roles
from pdjax.host.policies.role_api import Load, RoleView
from pdjax.host.roles.coverage import Coverage
from pdjax.host.roles.drains import Drains
from pdjax.host.roles.outages import Outages
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.service import Drain, Outage, Status, check_role
from pdjax.interfaces.events import TimerDue

ROLES = TimerDue("roles")


class RoleManager:
    """Changes roles, and takes engines out of service and back.

    Args:
      config: bounds of time, and of health.
      handoffs, lifecycle: move KV, and sequences.
      policies: say which engines change, and where sequences go.
      health: of the engines.
      max_model_len: tokens of the longest sequence.
      fleet: the engines.
      runtime: events, clock and recorder.

    Attributes:
      is_due: whether a moment has come that was asked for.
      changed: whether anything has changed that a turn has not seen.
    """

    def __init__(
        self,
        config: RolesConfig,
        handoffs: HandoffManager,
        policies: Policies,
        health: Health,
        max_model_len: int,
        fleet: Fleet,
        lifecycle: SequenceLifecycle,
        runtime: Runtime,
    ) -> None:
        self._config, self._fleet, self._lifecycle = config, fleet, lifecycle
        self._policy, self._health = policies.roles, health
        self._events, self._clock = runtime.events, runtime.clock
        self._coverage = Coverage(fleet, max_model_len)
        self._drains = Drains(
            fleet, lifecycle, handoffs, policies.decode, runtime, self._tell, self._put_out
        )
        self._outages = Outages(
            *(fleet, lifecycle, health, self._coverage, self._drains, runtime),
            self._tell,
            self._ask_at,
            self._drain,
        )
        self._looks = policies.roles.changes or config.slow_ratio is not None
        self._looks_at = inf  # the next look
        self._looked, self._arrived = self._clock.now(), 0  # by the last look: prompt tokens
        self.is_due = False
        self.changed = bool(self._drains.under_way or self._outages.under_way)
        for state in self._drains.under_way:
            assert state.service.drain is not None
            self._ask_at(state.service.drain.deadline)
        for state in self._outages.under_way:
            assert state.service.outage is not None
            self._ask_at(state.service.outage.until)
        self._outages.find_unserved()

    # What a front end calls.

    def set_role(self, state: EngineState, role: Role | None, cause: str = "asked for") -> None:
        """Let an engine have another role: at once where that leaves nothing out, else when it has
        drained. A change that is under way is replaced.

        Args:
          role: None puts the engine out of service, until it has a role again.

        Raises:
          ValueError: the engine does not accept the role's steps, or no other engine would serve
            what it leaves out.
        """
        service = state.service
        if role is not None:
            check_role(state.id, service.widest, role)
        out = service.outage is not None
        if out and role is None:
            return
        missing = self._coverage.missing(state, role)
        if out and role is not None:
            missing = self._coverage.missing_with(state, role)
        if missing is not None:
            to = "out of service" if role is None else f"to role {role.value}"
            raise ValueError(f"{state.id} {to}: {missing}; let another one do so first")
        service.stands_in = None
        if out and role is not None:
            service.role = role
            self._outages.take_back(state)
        else:
            self._drain(state, role, cause)

    def _drain(self, state: EngineState, role: Role | None, cause: str, lasts: float = inf) -> None:
        now, most = self._clock.now(), self._config.drain_deadline
        drain = Drain(role, cause, now, inf if most is None else now + most, lasts)
        self._ask_at(drain.deadline)
        self._drains.begin(state, drain)

    # Turns.

    @property
    def _is_active(self) -> bool:
        return bool(
            self.changed
            or self._drains.under_way
            or self.is_due
            or self._health.sick
            or self._outages.unserved
            or (self._looks and self._looks_at == inf)
        )

    def tend(self) -> bool:
        """Go on with what is under way. Returns whether anything changed."""
        if not self._is_active:
            return False
        self.changed, busy = False, bool(self._health.sick)
        while self._health.sick:
            self._outages.fail(*self._health.sick.popitem())
        if self.is_due:
            self.is_due = False
            busy |= self._outages.try_again()
        if self._looks:
            busy |= self._look()
        busy |= self._drains.go_on()
        return self._outages.fail_unserved() or busy

    def _ask_at(self, moment: float) -> None:
        if moment < inf:
            self._events.at(moment, ROLES)

    def _tell(self, state: EngineState) -> None:
        """What an engine is given has changed: policies are asked anew."""
        fleet, lifecycle = self._fleet, self._lifecycle
        fleet.touch(state)
        fleet.to_admit.update(fleet.decode)
        lifecycle.waiting_changed = lifecycle.prefilled_changed = self.changed = True
        self._outages.cut_off()
        self._outages.find_unserved()

    def _put_out(self, state: EngineState, drain: Drain) -> None:
        """An engine has drained that goes out of service."""
        now = self._clock.now()
        self._outages.put_out(state, Outage(drain.cause, now, now + drain.lasts, failed=False))

    # Looks.

    def _look(self) -> bool:
        """Every `interval`, while anything is under way: see which engines are slow, and ask the
        policy which change."""
        now = self._clock.now()
        if self._looks_at == inf:
            if self._fleet.busy:
                self._looks_at = now + self._config.interval
                self._ask_at(self._looks_at)
            return False
        if now < self._looks_at:
            return False
        self._looks_at = inf
        slow = [
            (state, cause) for state, cause in self._health.slow() if state.service.drain is None
        ]
        for state, cause in slow:
            if self._coverage.missing(state, None) is None:
                lasts = self._health.outage_seconds(state)
                self._drain(state, None, f"slow: {cause}", lasts)
        return self._ask(now) or bool(slow)

    def _ask(self, now: float) -> bool:
        """Ask the policy which engines change. What comes while one drains counts with the next
        look."""
        policy, lifecycle = self._policy, self._lifecycle
        if not policy.changes or self._drains.under_way:
            return False
        arrived, seconds = lifecycle.prompt_tokens - self._arrived, now - self._looked
        self._arrived, self._looked = lifecycle.prompt_tokens, now
        views = [self._view(state) for state in self._fleet if state.service.outage is None]
        load = Load(tuple(lifecycle.waiting), tuple(lifecycle.prefilled), arrived, seconds)
        plan = policy.change(views, load, now)
        check_roles(policy, plan, views)
        for change in plan:
            self.set_role(self._fleet.engines[change.engine], change.role, change.cause)
        return bool(plan)

    def _view(self, state: EngineState) -> RoleView:
        rows, options = state.pipeline, list[Role]()
        for role in Role:
            if role is not state.role and state.service.widest.includes(role):
                options += [role] * (self._coverage.missing(state, role) is None)
        return RoleView(
            engine=state.id,
            role=state.role,
            options=frozenset(options),
            token_budget=state.buckets.token_budget,
            backlog=state.backlog if state.prefills else 0,
            rows=0 if rows is None else rows.rows,
            taken_rows=0 if rows is None else rows.taken_rows,
            prefill_times=state.prefill_times,
            token_times=state.token_times,
        )

    def check(self) -> None:
        """Assert that what is known here and of each engine agrees."""
        for state in self._fleet:
            status = state.service.status
            drains, out = state in self._drains.under_way, state in self._outages.under_way
            assert drains == (status is Status.DRAINING), f"{state.id}: {status}, drains: {drains}"
            assert out == (status is Status.OUT), f"{state.id}: {status}, out of service: {out}"
            if out:
                assert not (state.running or state.decoding), f"{state.id}: works out of service"
