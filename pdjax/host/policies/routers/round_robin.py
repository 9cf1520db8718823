"""Engines in turn."""

from collections.abc import Sequence as Seq

from pdjax.core.ids import EngineId
from pdjax.host.policies.api import EngineView, PolicySetup
from pdjax.host.sequences.sequence import Sequence


class RoundRobin:
    """The engine that was chosen longest ago, and before that one that never was: with all engines
    able, each in turn. One that had no room for a while gets no more than the others afterwards.

    It looks at nothing that an engine does, as the round-robin of any load balancer: the least that
    another router must be better than. It remembers its own answers.
    """

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup
        self._turns = {"prefill": dict[EngineId, int](), "decode": dict[EngineId, int]()}

    def prefill_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """See `Router`."""
        return _next(engines, self._turns["prefill"])

    def decode_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """See `Router`."""
        return _next(engines, self._turns["decode"])


def _next(engines: Seq[EngineView], turns: dict[EngineId, int]) -> EngineView:
    chosen = min(engines, key=lambda view: turns.get(view.engine, 0))
    turns[chosen.engine] = 1 + max(turns.values(), default=0)
    return chosen
