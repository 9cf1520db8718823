"""The one whose time is up first."""

from math import inf

from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.sequences.sequence import Sequence


class EarliestDeadline:
    """An order: the earliest deadline first (EDF, Liu and Layland 1973), which meets every deadline
    where any order does. A wanted time to first token is a deadline, too. Requests without one come
    last, by age; while requests with deadlines fill the engines, they wait. Beyond what engines can
    do EDF is known to be poor, since it serves first what is late already: shed that
    (`policies.admission="early_rejection"`).
    """

    def rank(self, sequence: Sequence) -> tuple[float, int]:
        """See `Ranked`."""
        request = sequence.request
        first = None if request.slo is None else request.slo.ttft
        bounds = [bound for bound in (request.deadline, first) if bound is not None]
        return request.arrival + min(bounds, default=inf), sequence.order


class EarliestDeadlinePrefill(EarliestDeadline, FcfsPrefill):
    """Packs prompts by the deadlines of their requests."""


class EarliestDeadlineDecode(EarliestDeadline, FcfsDecode):
    """Hands over sequences by the deadlines of their requests."""
