"""Which engines change what they do: none, or those of the side that has less to do."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from math import inf

from pdjax.core.roles import Role
from pdjax.host.policies.api import PolicySetup
from pdjax.host.policies.role_api import Load, RoleChange, RoleView
from pdjax.host.step_times import StepTimes

_NEWEST = 0.5
"""What the newest look counts in the mean rate of arrivals."""


class FixedRoles:
    """No engine changes."""

    changes = False

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def change(self, engines: Seq[RoleView], load: Load, now: float) -> list[RoleChange]:
        """See `RolePolicy`."""
        return []


class BalanceRoles:
    """Gives the side that has more to do than it can an engine of the side that has little (as the
    planner of Dynamo scales either side, and Arrow and Mooncake convert instances between them).

    The load of prefill is what comes in a second by what its engines compute, and what is queued by
    what they compute in `roles.ttft_target`. The load of decode is the rows that are taken or
    waited for by those that engines have; with `policies.tpot_target`, that keep the pace. Both go
    by what engines have measured of themselves; one that has not yet done a kind of work is taken
    to do it as the mean of those that have.

    Hysteresis: an engine is moved when one side has been at `roles.high` or above, and the other
    would be at `roles.low` or below without that engine, at each of `roles.holds` looks; and no
    sooner than `roles.pause` after the last change. So to undo a change takes a load that differs
    by the distance of the two bounds at least.

    Of the engines that would do, the one with the least to end changes. A side of one engine gives
    none away: that engine does both, while it must.
    """

    changes = True

    def __init__(self, setup: PolicySetup) -> None:
        self._config, self._tpot = setup.config.roles, setup.config.policies.tpot_target
        self._rate: float | None = None  # of arrivals, tokens a second
        self._seen: tuple[Role | None, int] = None, 0  # the side that is short, and looks in a row
        self._changed = -inf

    def change(self, engines: Seq[RoleView], load: Load, now: float) -> list[RoleChange]:
        """See `RolePolicy`."""
        rate = load.arrived_tokens / load.seconds if load.seconds > 0 else 0.0
        before = rate if self._rate is None else self._rate
        self._rate = _NEWEST * rate + (1 - _NEWEST) * before
        short = self._short(engines, load)
        found = None if short is None else self._find(short, engines, load)
        if found is None:
            self._seen = None, 0
            return []
        last, looks = self._seen
        self._seen = short, looks + 1 if short is last else 1
        if self._seen[1] < self._config.holds or now - self._changed < self._config.pause:
            return []
        self._seen, self._changed = (None, 0), now
        return [found]

    def _short(self, engines: Seq[RoleView], load: Load) -> Role | None:
        """The side that has more to do than it can, unless both have."""
        prefill, decode = (each >= self._config.high for each in self._loads(engines, load))
        if prefill == decode:
            return None
        return Role.PREFILL if prefill else Role.DECODE

    def _find(self, short: Role, engines: Seq[RoleView], load: Load) -> RoleChange | None:
        """The change that would help a side."""
        other = Role.DECODE if short is Role.PREFILL else Role.PREFILL
        prefill, decode = self._loads(engines, load)
        cause = f"the load of prefill is {prefill:.2f}, that of decode {decode:.2f}"
        gives = [view for view in engines if short in view.options and view.role.includes(other)]
        for view in sorted(gives, key=lambda view: (view.role is Role.MIXED, _to_end(view, other))):
            left = self._loads(engines, load, without=view)[other is Role.DECODE]
            if left <= self._config.low:
                return RoleChange(view.engine, short, cause)
        joins = [view for view in engines if Role.MIXED in view.options and view.role is other]
        if not joins or (prefill, decode)[other is Role.DECODE] > self._config.low:
            return None
        view = min(joins, key=lambda view: _to_end(view, other))
        return RoleChange(view.engine, Role.MIXED, cause)

    # How much there is to do, 1 being all that can be done.

    def _loads(
        self, engines: Seq[RoleView], load: Load, without: RoleView | None = None
    ) -> tuple[float, float]:
        """Of prefill and of decode, the latter and the former without what an engine does of it."""
        return self._of_prefill(engines, load, without), self._of_decode(engines, load, without)

    def _of_prefill(self, engines: Seq[RoleView], load: Load, without: RoleView | None) -> float:
        can = _each(engines, _tokens_a_second)
        able = sum(can[view.engine] for view in engines if view.role.prefills and view != without)
        queued = sum(view.backlog for view in engines)
        queued += sum(sequence.length for sequence in load.waiting)
        if not (queued or self._rate):
            return 0.0
        if not any(can.values()):
            return 0.0  # no step has come back yet
        if not able:
            return inf
        return (self._rate or 0.0) / able + queued / able / self._config.ttft_target

    def _of_decode(self, engines: Seq[RoleView], load: Load, without: RoleView | None) -> float:
        wanted = len(load.prefilled) + sum(view.taken_rows for view in engines)
        can = _each(engines, self._rows)
        able = sum(can[view.engine] for view in engines if view.role.decodes and view != without)
        return wanted / able if able else inf if wanted else 0.0

    def _rows(self, view: RoleView) -> float:
        """Rows of an engine that keep the pace."""
        if self._tpot is None or not view.token_times.measured:
            return float(view.rows)
        base, each = view.token_times.line()
        if each <= 0:
            return float(view.rows)
        return min(float(view.rows), max(1.0, (self._tpot - base) / each))


def _each(engines: Iterable[RoleView], measure: Callable[[RoleView], float]) -> dict[object, float]:
    """A measure of each engine: of one that has none, the mean of the others."""
    found = {view.engine: measure(view) for view in engines}
    known = [value for value in found.values() if value]
    mean = sum(known) / len(known) if known else 0.0
    return {name: value or mean for name, value in found.items()}


def _tokens_a_second(view: RoleView) -> float:
    """Prompt tokens that an engine computes in full steps; 0 where it has not done any."""
    times: StepTimes = view.prefill_times
    seconds = times.seconds(view.token_budget)
    return view.token_budget / seconds if seconds else 0.0


def _to_end(view: RoleView, side: Role) -> int:
    """What an engine has to end before it has left a side."""
    return view.backlog if side is Role.PREFILL else view.taken_rows
