"""What an engine is given to do, and whether it is in service. It outlives a loop that an error has
broken off."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from pdjax.core.ids import EngineId
from pdjax.core.messages import shown
from pdjax.core.roles import Role
from pdjax.interfaces.engine import Engine
from pdjax.interfaces.steps import StepKind


@dataclass(eq=False, slots=True)
class Service:
    """Of one engine.

    Attributes:
      widest: all that the engine can be given, by the steps that it accepts.
      role: what it is given.
    """

    widest: Role
    role: Role

    @property
    def gives_prompts(self) -> bool:
        """Whether the engine is given prompts that wait."""
        return self.role.prefills

    @property
    def gives_rows(self) -> bool:
        """Whether the engine is given sequences to decode."""
        return self.role.decodes


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
        if not widest[name].includes(role):
            raise ValueError(
                f"roles: {name} cannot have role {role.value}; it accepts steps of "
                f"{widest[name].value} alone"
            )
    return {name: Service(most, roles.get(name, most)) for name, most in widest.items()}
