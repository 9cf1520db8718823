"""Which of several engines a sequence goes to."""

from collections.abc import Sequence as Seq

from pdjax.host.policies.api import EngineView, PolicySetup
from pdjax.host.sequences.sequence import Sequence


class LeastLoaded:
    """The engine with the least to do; among equals the one with the most free rows and pages, and
    then the first."""

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def prefill_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """Load is the tokens that an engine still has to compute. One whose pool has decode rows of
        which none is free comes last: what it prefills would have to wait there for one."""
        return min(engines, key=_prefill_load)

    def decode_engine(self, sequence: Sequence, engines: Seq[EngineView]) -> EngineView:
        """Load is the share of rows taken."""
        return min(engines, key=_decode_load)


def _prefill_load(view: EngineView) -> tuple[bool, float, int, int]:
    rows = view.free_rows_of_pool
    return rows == 0, view.backlog, -(rows or 0), -view.free_pages


def _decode_load(view: EngineView) -> tuple[float, int]:
    return -view.free_rows / view.rows, -view.free_pages
