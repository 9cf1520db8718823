"""Classes of priority, with ageing."""

from pdjax.core.request import MAX_PRIORITY
from pdjax.host.policies.api import PolicySetup
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.sequences.sequence import Sequence


class Priority:
    """An order: by `Request.priority`, the lower the earlier, as in vLLM's priority scheduling, but
    not strictly. A class counts as `seconds_a_class` seconds of waiting: a sequence is overtaken
    only by those of a class lower by d that come within `d * seconds_a_class` seconds after it
    (`policies.seconds_a_class`; infinite is strict).
    Classes are -100 to 100, and a priority beyond counts as the nearest of them: so no sequence is
    overtaken by those that come more than `200 * seconds_a_class` seconds after it, 100 minutes by
    default. Strict classes have no such bound: requests of a lower class starve those of a higher
    one for as long as their load lasts.
    """

    def __init__(self, setup: PolicySetup) -> None:
        self._seconds_a_class = setup.config.policies.seconds_a_class

    def rank(self, sequence: Sequence) -> tuple[float, float, int]:
        """See `Ranked`."""
        arrival = sequence.request.arrival
        priority = max(-MAX_PRIORITY, min(MAX_PRIORITY, sequence.request.priority))
        behind = self._seconds_a_class * priority if priority else 0.0
        return behind + arrival, arrival, sequence.order


class PriorityPrefill(Priority, FcfsPrefill):
    """Packs prompts by the priorities of their requests."""

    def __init__(self, setup: PolicySetup) -> None:
        Priority.__init__(self, setup)
        FcfsPrefill.__init__(self, setup)


class PriorityDecode(Priority, FcfsDecode):
    """Hands over sequences by the priorities of their requests."""

    def __init__(self, setup: PolicySetup) -> None:
        Priority.__init__(self, setup)
        FcfsDecode.__init__(self, setup)
