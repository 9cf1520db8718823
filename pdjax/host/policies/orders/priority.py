"""Classes of priority, with ageing."""

from pdjax.core.request import MAX_PRIORITY
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.sequences.sequence import Sequence


class Priority:
    """An order: by `Request.priority`, the lower the earlier, as in vLLM's priority scheduling, but
    not strictly. A class counts as `seconds_a_class` seconds of waiting: a sequence is overtaken
    only by those of a class lower by d that come within `d * seconds_a_class` seconds after it.
    Classes are -100 to 100, and a priority beyond counts as the nearest of them: so no sequence is
    overtaken by those that come more than `200 * seconds_a_class` seconds after it, 100 minutes by
    default. Strict classes have no such bound: requests of a lower class starve those of a higher
    one for as long as their load lasts.

    Attributes:
      seconds_a_class: seconds of waiting that make up for a class; infinite is strict.
    """

    seconds_a_class: float = 30.0

    def rank(self, sequence: Sequence) -> tuple[float, float, int]:
        """See `Ranked`."""
        arrival = sequence.request.arrival
        priority = max(-MAX_PRIORITY, min(MAX_PRIORITY, sequence.request.priority))
        behind = self.seconds_a_class * priority if priority else 0.0
        return behind + arrival, arrival, sequence.order


class PriorityPrefill(Priority, FcfsPrefill):
    """Packs prompts by the priorities of their requests."""


class PriorityDecode(Priority, FcfsDecode):
    """Hands over sequences by the priorities of their requests."""
