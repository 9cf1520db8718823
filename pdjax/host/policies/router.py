"""Which of several engines a sequence goes to."""

from collections.abc import Sequence as Seq

from pdjax.host.policies.api import EngineView, PolicySetup
from pdjax.host.sequences.sequence import Sequence


class LeastLoaded:
    """The engine with the least to do; among equals the one with the most free pages, and then the
    first."""

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def prefill_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """Load is the tokens that an engine still has to compute."""
        return min(engines, key=_prefill_load)

    def decode_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """Load is the share of rows taken."""
        return min(engines, key=_decode_load)


def _prefill_load(view: EngineView) -> tuple[float, int]:
    return view.backlog, -view.free_pages


def _decode_load(view: EngineView) -> tuple[float, int]:
    return -view.free_rows / view.rows, -view.free_pages
