"""The shortest first, and waiting makes a sequence shorter."""

from pdjax.host.policies.api import PolicySetup
from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.policies.prefill import FcfsPrefill
from pdjax.host.sequences.sequence import Sequence


class ShortestFirst:
    """An order: fewest tokens first (shortest job first, whose mean wait no other order of jobs of
    known length goes below), with ageing. Each second of waiting counts as
    `policies.tokens_a_second` tokens less. So a sequence of N tokens is overtaken only by those
    that come within `N / tokens_a_second` seconds after it, and none starves.

    TetriInfer (Hu et al. 2024) orders its prefill queue so, without ageing, within batches.
    """

    def __init__(self, setup: PolicySetup) -> None:
        self._tokens_a_second = setup.config.policies.tokens_a_second

    def rank(self, sequence: Sequence) -> tuple[float, int]:
        """See `Ranked`."""
        aged = sequence.length + self._tokens_a_second * sequence.request.arrival
        return aged, sequence.order


class ShortestFirstPrefill(ShortestFirst, FcfsPrefill):
    """Packs the shortest prompts first. Whole prompts are compared: what an engine has of one in
    its cache is known only when one is chosen."""

    def __init__(self, setup: PolicySetup) -> None:
        ShortestFirst.__init__(self, setup)
        FcfsPrefill.__init__(self, setup)


class ShortestFirstDecode(ShortestFirst, FcfsDecode):
    """Hands over first what needs fewest pages, and so finds room soonest."""

    def __init__(self, setup: PolicySetup) -> None:
        ShortestFirst.__init__(self, setup)
        FcfsDecode.__init__(self, setup)
