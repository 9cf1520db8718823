"""Which of several engines a sequence goes to."""

from collections.abc import Sequence as Seq

from pdjax.host.policies.api import DecodeView, PrefillView
from pdjax.host.sequences.sequence import Sequence


class LeastLoaded:
    """The engine with the least to do; among equals the one with the most free pages."""

    def prefill_engine(self, sequence: Sequence, engines: Seq[PrefillView]) -> PrefillView:
        """Load is the tokens that an engine still has to compute."""
        return min(engines, key=lambda view: (view.backlog, -view.free_pages, view.engine))

    def decode_engine(self, sequence: Sequence, engines: Seq[DecodeView]) -> DecodeView:
        """Load is the share of rows taken."""
        return min(
            engines, key=lambda view: (-view.free_rows / view.rows, -view.free_pages, view.engine)
        )
