"""Whether the engines in service do all that requests need."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from pdjax.core.roles import Role
from pdjax.host.engines import EngineState
from pdjax.host.fleet import Fleet


class Coverage:
    """Knows what the longest request needs, and what would be missing.

    Args:
      fleet: the engines.
      max_model_len: tokens of the longest sequence.
    """

    def __init__(self, fleet: Fleet, max_model_len: int) -> None:
        self._fleet = fleet
        sides = fleet.prefill, fleet.decode
        self._tokens = min(
            max_model_len, *(max(state.pool.tokens for state in side) for side in sides)
        )

    def missing(self, state: EngineState, role: Role | None) -> str | None:
        """What no engine would do while one changes to another role, or out of service, which None
        is; None where nothing is missing."""
        kept = state.role.common(role)
        return self._missing_if(
            state,
            kept is not None and kept.prefills and state.takes_prompts,
            kept is not None and kept.decodes and state.takes_rows,
        )

    def missing_with(self, state: EngineState, role: Role) -> str | None:
        """What no engine would do if one that is out of service came back with a role; None where
        nothing would be missing, or also with all that it can be given."""
        widest = state.service.widest
        if self._missing_if(state, widest.prefills, widest.decodes) is not None:
            return None
        return self._missing_if(state, role.prefills, role.decodes)

    def without(self, state: EngineState) -> str | None:
        """What no engine could do without one, if all others in service did all that they can;
        None where nothing would be missing."""
        others = [each for each in self._fleet if each is not state and not each.service.outage]
        return self._missing(
            [each for each in others if each.service.widest.prefills],
            [each for each in others if each.service.widest.decodes],
        )

    def lacking(self) -> str | None:
        """What no engine in service does; None where nothing is missing."""
        return self._missing(self._fleet.for_prompts, self._fleet.for_rows, "engine")

    def would_help(self, state: EngineState) -> bool:
        """Whether an engine could do more than it does, also for the longest requests."""
        is_all = state.takes_prompts and state.takes_rows
        return (
            state.service.widest is Role.MIXED and not is_all and state.pool.tokens >= self._tokens
        )

    def _missing_if(self, state: EngineState, gives_prompts: bool, gives_rows: bool) -> str | None:
        prompts = [each for each in self._fleet.for_prompts if each is not state]
        rows = [each for each in self._fleet.for_rows if each is not state]
        if gives_prompts:
            prompts.append(state)
        if gives_rows:
            rows.append(state)
        return self._missing(prompts, rows)

    def _missing(
        self, prompts: Seq[EngineState], rows: Seq[EngineState], which: str = "other engine"
    ) -> str | None:
        """An engine that prefills and one that decodes must have room for the longest request, and
        KV a way from the first to the second."""
        ends = [state for state in rows if state.pool.tokens >= self._tokens]
        starts = [state for state in prompts if state.pool.tokens >= self._tokens]
        size = f"requests of {self._tokens} tokens"
        if not ends:
            return f"no {which} in service would decode {size}"
        if not starts:
            return f"no {which} in service would prefill {size}"
        if not any(reaches(state, ends) for state in starts):
            return f"KV of {size} would have no way to an engine that decodes"
        return None

    def gives(self, side: Role) -> list[EngineState]:
        """The engines that are given prompts, or rows."""
        return self._fleet.for_rows if side is Role.DECODE else self._fleet.for_prompts


def reaches(state: EngineState, ends: Iterable[EngineState]) -> bool:
    """Whether KV that an engine computes can come to any of these."""
    return any(state.pool.id in end.sources for end in ends)
