"""Eviction by the moment of the last use."""

from collections.abc import Sequence as Seq

from pdjax.core.kv_layout import KVLayout
from pdjax.core.recompute import RecomputeCost
from pdjax.host.kv.eviction import TailsFirst
from pdjax.host.policies.api import PolicySetup


class _HeadsFirst(TailsFirst):
    """The pages of a sequence count as used one after the other."""

    def cache(self, pages: Seq[int]) -> None:
        """See `EvictionOrder`."""
        self._pages.update(dict.fromkeys(pages))


class PrefixLru:
    """What was used longest ago; of the pages of a sequence the last one first, since without its
    predecessors a page cannot be found."""

    def __init__(self, setup: PolicySetup | None = None) -> None:
        del setup

    def order(self, layout: KVLayout, recompute: RecomputeCost | None = None) -> TailsFirst:
        """See `EvictionPolicy`."""
        del layout, recompute
        return TailsFirst()


class Lru(PrefixLru):
    """What was used longest ago, as if each page had been used by itself: of a sequence the first
    one goes first, and those behind it, which cannot be found then, follow. It is the textbook's
    rule, which another must be better than."""

    def order(self, layout: KVLayout, recompute: RecomputeCost | None = None) -> TailsFirst:
        """See `EvictionPolicy`."""
        del layout, recompute
        return _HeadsFirst()
