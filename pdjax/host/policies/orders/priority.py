"""Classes of priority, with ageing."""

from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.sequences.sequence import Sequence


class Priority:
    """An order: by `Request.priority`, the lower the earlier, as in vLLM's priority scheduling, but
    not strictly. A class counts as `seconds_a_class` seconds of waiting: a sequence is overtaken
    only by those of a class lower by d that come within `d * seconds_a_class` seconds after it.
    Under strict classes whoever can set a priority can starve everybody else for as long as the
    load lasts; with ageing each wait has a bound.

    Attributes:
      seconds_a_class: seconds of waiting that make up for a class; infinite is strict.
    """

    seconds_a_class: float = 30.0

    def rank(self, sequence: Sequence) -> tuple[float, float, int]:
        """See `Ranked`."""
        priority, arrival = sequence.request.priority, sequence.request.arrival
        behind = self.seconds_a_class * priority if priority else 0.0
        return behind + arrival, arrival, sequence.order


class PriorityPrefill(Priority, FcfsPrefill):
    """Packs prompts by the priorities of their requests."""


class PriorityDecode(Priority, FcfsDecode):
    """Hands over sequences by the priorities of their requests."""
