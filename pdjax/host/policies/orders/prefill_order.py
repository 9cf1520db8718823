"""The order in which prefills have ended."""

from pdjax.host.policies.decode import FcfsDecode
from pdjax.host.sequences.sequence import Sequence


class PrefillOrderDecode(FcfsDecode):
    """Hands over sequences in the order in which their prefills have ended: what order the prefill
    policy has chosen, as that of fair shares, holds on. Nobody is overtaken by a sequence whose
    prefill ends later."""

    def rank(self, sequence: Sequence) -> int:
        """See `Ranked`: all are equal, and of equals the first one stays first."""
        return 0
