"""Requests that are refused early: the admission policy is asked, and what it names is ended."""

from pdjax.host.fleet import Fleet
from pdjax.host.handoff.deadlines import NEVER
from pdjax.host.policies.api import AdmissionPolicy, AskAgain
from pdjax.host.policies.check import check_shed
from pdjax.host.runtime import Runtime
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.host.sequences.sequence import State
from pdjax.interfaces.events import TimerDue

SHED = TimerDue("admission policy")


class Shedding:
    """Asks the admission policy about requests that have come, when an engine has been measured for
    the first time, and when it wants to be asked.

    Args:
      policy: names what is refused.
      fleet, lifecycle: what it sees.
      runtime: timers and clock.

    Attributes:
      is_due: whether a moment has come at which the policy wants to be asked.
    """

    def __init__(
        self,
        policy: AdmissionPolicy,
        fleet: Fleet,
        lifecycle: SequenceLifecycle,
        runtime: Runtime,
    ) -> None:
        self._policy, self._fleet, self._lifecycle = policy, fleet, lifecycle
        self._events, self._clock = runtime.events, runtime.clock
        self._asks_at = NEVER
        self.is_due = False

    def shed(self) -> None:
        """End what the policy refuses, with all choices of its request, if none has begun."""
        lifecycle, policy = self._lifecycle, self._policy
        if not (lifecycle.arrived or self.is_due or self._fleet.newly_measured):
            return
        arrived, lifecycle.arrived = lifecycle.arrived, []
        self.is_due = self._fleet.newly_measured = False
        if not policy.sheds:
            return
        arrived = [each for each in arrived if each.state is State.WAITING]
        fleet = self._fleet
        views = fleet.views(fleet.for_prompts), fleet.views(fleet.for_rows)
        now = self._clock.now()
        plan = policy.shed(arrived, lifecycle.waiting, *views, now)
        check_shed(policy, plan, lifecycle.waiting, now)
        for each in plan:
            if not isinstance(each, AskAgain):
                lifecycle.shed(each.sequence.request.id, f"{each.cause}: {each.reason}")
            elif not now < self._asks_at <= each.at:
                self._asks_at = each.at
                self._events.at(each.at, SHED)
