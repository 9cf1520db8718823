"""How engines fare: those whose steps fail, and those that are slower than their peers."""

import statistics
from collections.abc import Iterator
from math import inf

from pdjax.config import RolesConfig
from pdjax.core.clock import Clock
from pdjax.core.messages import reason_of
from pdjax.core.roles import Role
from pdjax.host.engines import EngineState
from pdjax.host.fleet import Fleet
from pdjax.host.service import Outage
from pdjax.host.step_times import StepTimes
from pdjax.interfaces.steps import StepKind

_FORGIVEN = 1 / 16
"""Failures that a step which did not fail makes up for."""
_FEWEST_STEPS = 8
"""Steps of an engine, and of a peer, below which their times say nothing."""
_HOPELESS = 4
"""Times `failures` that steps must fail in a row of an engine that has no substitute: a few
requests that break every step must not end the service for the others."""
_LONGEST = 32
"""Times `retry_after` that an outage lasts at most."""


class Health:
    """Counts what fails, and compares how long steps take.

    An engine that fails or lags is put aside for a time that doubles, and then tried with real
    work, as proxies do with hosts that answer badly (outlier detection of Envoy; circuit breakers,
    Nygard 2007).

    Args:
      config: bounds.
      fleet: the engines.
      clock: tells the time.

    Attributes:
      sick: engines that have failed too often, and why, until someone takes them out of service.
    """

    def __init__(self, config: RolesConfig, fleet: Fleet, clock: Clock) -> None:
        self._config, self._fleet, self._clock = config, fleet, clock
        self.sick: dict[EngineState, str] = {}

    def failed(self, state: EngineState, error: BaseException | str, started: float) -> None:
        """A step of an engine has failed that was dispatched at `started`, or the engine has lost
        its pool. What was in flight then fails with it, and counts as the same failure."""
        service, now = state.service, self._clock.now()
        if self._config.failures is None or started < service.failed_at:
            return
        service.failures, service.failed_at = service.failures + 1, now
        service.failed_in_row += 1
        if service.failures >= self._config.failures and service.outage is None:
            why = error if isinstance(error, str) else reason_of(error)
            self.sick[state] = f"its steps failed, the last with {why}"

    def worked(self, state: EngineState) -> None:
        """A step of an engine has come back well."""
        state.service.failed_in_row = 0
        if state.service.failures:
            state.service.failures = max(0.0, state.service.failures - _FORGIVEN)

    def is_hopeless(self, state: EngineState) -> bool:
        """Whether so many steps of an engine have failed, and none come back well since, that it
        has to go out of service even if nobody else does what it does."""
        return state.service.failed_in_row >= _HOPELESS * (self._config.failures or inf)

    def is_served_elsewhere(self, state: EngineState, kind: StepKind) -> bool:
        """Whether another engine is given the work of a step that has failed, or could stand
        in."""
        if self._config.failures is None:
            return False
        others = [each for each in self._fleet if each is not state and not each.service.outage]
        if any(each.service.widest is Role.MIXED for each in others):
            return True
        prompts = any(each.takes_prompts for each in others)
        rows = any(each.takes_rows for each in others)
        return prompts and (rows or kind is StepKind.PREFILL)

    @property
    def most_attempts(self) -> int:
        """Failed steps after which a sequence fails."""
        return self._config.failures or 0

    # Slow ones.

    def slow(self) -> Iterator[tuple[EngineState, str]]:
        """The engines that have been slow for some looks in a row, and how slow. To be asked at
        each look."""
        if self._config.slow_ratio is None:
            return
        ratios: dict[EngineState, float] = {}
        fleet = self._fleet
        for peers, times in (
            (fleet.for_prompts, [each.prefill_times for each in fleet.for_prompts]),
            (fleet.for_rows, [each.token_times for each in fleet.for_rows]),
        ):
            for state, its in zip(peers, times, strict=True):
                found = _ratio(its, [other for other in times if other is not its])
                ratios[state] = max(ratios.get(state, 0.0), found)
        for state, ratio in ratios.items():
            service = state.service
            service.slow = service.slow + 1 if ratio > self._config.slow_ratio else 0
            if service.slow >= self._config.holds:
                yield state, f"its steps take {ratio:.1f} times those of its peers"

    # Outages.

    def outage_seconds(self, state: EngineState) -> float:
        """How long the next outage of an engine lasts: twice the last one if that was not longer
        ago than it lasted."""
        service = state.service
        recent = self._clock.now() - service.back <= service.lasted
        service.outages = service.outages + 1 if recent else 1
        return self._config.retry_after * min(_LONGEST, 2 ** (service.outages - 1))

    def recovered(self, state: EngineState) -> None:
        """An engine is taken back: its next failure puts it out again, and its times are measured
        anew."""
        service, now = state.service, self._clock.now()
        assert isinstance(service.outage, Outage), f"{state.id} is in service"
        ended = service.outage
        service.lasted = now - ended.since if ended.until < inf else 0.0
        service.outage, service.back, service.slow = None, now, 0
        service.failures = max(0.0, (self._config.failures or 1) - 1.0) if ended.failed else 0.0
        state.forget_times()
        self.sick.pop(state, None)


def _ratio(its: StepTimes, others: list[StepTimes]) -> float:
    """What steps of an engine take, by what its peers' of the same size are predicted to take; 0
    where that is not known."""
    peers = [each for each in others if each.count >= _FEWEST_STEPS]
    if its.count < _FEWEST_STEPS or not peers:
        return 0.0
    size = round(its.mean_size)
    usual = statistics.median(each.seconds(size) or 0.0 for each in peers)
    return (its.seconds(size) or 0.0) / usual if usual > 0 else 0.0
