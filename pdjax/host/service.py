"""What an engine is given to do, and whether it is in service. It outlives a loop that an error has
broken off."""

import enum
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from pdjax.core.ids import EngineId
from pdjax.core.messages import shown
from pdjax.core.roles import Role
from pdjax.interfaces.engine import Engine
from pdjax.interfaces.steps import StepKind


class Status(enum.Enum):
    """Whether an engine is in service."""

    SERVING = "serving"
    DRAINING = "draining"
    OUT = "out of service"


@dataclass(frozen=True)
class Drain:
    """An engine ends what it will not do afterwards, and is given no more of that.

    Attributes:
      to: its role afterwards; None where it goes out of service.
      cause: why, for a reader.
      since: the moment at which it began.
      deadline: the moment at which it gives up what it still has.
      lasts: seconds that it then stays out of service, at least.
    """

    to: Role | None
    cause: str
    since: float
    deadline: float = math.inf
    lasts: float = math.inf


@dataclass(frozen=True)
class Outage:
    """An engine is out of service.

    Attributes:
      cause: why, for a reader.
      since: the moment at which it went.
      until: the moment at which it is tried again; infinite where it is taken back by hand alone.
      failed: whether its steps have failed. One that is merely slow is better than none.
    """

    cause: str
    since: float
    until: float
    failed: bool


@dataclass(eq=False, slots=True)
class Service:
    """Of one engine.

    Attributes:
      widest: all that the engine can be given, by the steps that it accepts.
      role: what it is given.
      drain: under way, if it is draining; `outage`: if it is out of service.
      cut_off: whether no engine that is given rows can take the KV that it would compute.
      stands_in: the role that it had before it had to do the work of engines that are out of
        service, too; None where it does not.
      failures: steps of it that have failed, less a part for each that has not; `failed_in_row`:
        since the last that has not. `failed_at`: when the last of them did.
      slow: looks in a row that have found it slow.
      outages: in a row, each soon after the one before. `back`: when it was last taken back;
        `lasted`: seconds of the last outage.
    """

    widest: Role
    role: Role
    drain: Drain | None = None
    outage: Outage | None = None
    cut_off: bool = False
    stands_in: Role | None = None
    failures: float = 0.0
    failed_in_row: int = 0
    failed_at: float = -math.inf
    slow: int = 0
    outages: int = 0
    back: float = -math.inf
    lasted: float = 0.0

    @property
    def status(self) -> Status:
        """Whether it is in service."""
        if self.outage is not None:
            return Status.OUT
        return Status.SERVING if self.drain is None else Status.DRAINING

    @property
    def gives_prompts(self) -> bool:
        """Whether the engine is given prompts that wait."""
        return self.role.prefills and not self.drops_prompts and not self.cut_off

    @property
    def gives_rows(self) -> bool:
        """Whether the engine is given sequences to decode."""
        return self.role.decodes and not self.drops_rows

    @property
    def drops_prompts(self) -> bool:
        """Whether it is out of service, or will prefill no more."""
        return self.outage is not None or (
            self.drain is not None and (self.drain.to is None or not self.drain.to.prefills)
        )

    @property
    def drops_rows(self) -> bool:
        """Whether it is out of service, or will decode no more."""
        return self.outage is not None or (
            self.drain is not None and (self.drain.to is None or not self.drain.to.decodes)
        )

    @property
    def cause(self) -> str | None:
        """Why it drains or is out of service."""
        why = self.outage or self.drain
        return None if why is None else why.cause


def widest_role(accepts: Collection[StepKind], engine: EngineId) -> Role:
    """All that an engine can be given.

    Raises:
      ValueError: it accepts neither prefill nor decode steps.
    """
    prefills, decodes = (kind in accepts for kind in (StepKind.PREFILL, StepKind.DECODE))
    if not (prefills or decodes):
        names = ", ".join(sorted(kind.value for kind in accepts)) or "none"
        raise ValueError(f"{engine}: accepts={names}; must include prefill or decode")
    return Role.of(prefills=prefills, decodes=decodes)


def services_of(
    engines: Iterable[Engine], roles: Mapping[EngineId, Role] | None = None
) -> dict[EngineId, Service]:
    """The service of each engine at the start.

    Args:
      roles: of some engines; any other is given all that it accepts.

    Raises:
      ValueError: a role of no engine, or of one that does not accept its steps.
    """
    widest = {engine.id: widest_role(engine.accepts, engine.id) for engine in engines}
    roles = dict(roles or {})
    for name, role in roles.items():
        if name not in widest:
            raise ValueError(f"roles: {shown(name)} is no engine; there are {', '.join(widest)}")
        check_role(name, widest[name], role)
    return {name: Service(most, roles.get(name, most)) for name, most in widest.items()}


def check_role(engine: EngineId, widest: Role, role: Role) -> None:
    """Refuse a role whose steps an engine does not accept.

    Raises:
      ValueError: naming both.
    """
    if not widest.includes(role):
        raise ValueError(
            f"roles: {engine} cannot have role {role.value}; it accepts steps of {widest.value} "
            "alone"
        )
