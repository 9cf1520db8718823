"""The part of a prompt that comes up from a tier to the pool where it will be prefilled."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pdjax.host.kv.pools import PoolState
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.transport import KeptPage


@dataclass(eq=False)
class Load:
    """What a LOADING sequence waits for, and the pages that are held for it at both ends.

    Attributes:
      sequence: waits.
      tier, target: the pools.
      there: pages of the target that hold what comes before, which is of no use without them.
      pages: of the tier, in order.
      target_pages: what they become.
      drop: forgets what is on its way for a load, so that none of it is written any more.
      sent: how many of them have left. `arrived`: how many have been written and can be found, or
        have failed.
      failed: whether any has failed.
      closed: it holds nothing any longer.
    """

    sequence: Sequence
    tier: PoolState
    target: PoolState
    there: list[int]
    pages: list[KeptPage]
    target_pages: list[int]
    drop: Callable[["Load"], None]
    sent: int = 0
    arrived: int = 0
    failed: bool = False
    closed: bool = field(default=False, init=False)

    @property
    def unsent(self) -> int:
        """Pages that have not left."""
        return 0 if self.closed else len(self.pages) - self.sent

    def held(self) -> Iterator[tuple[PoolState, list[int]]]:
        """The pages that it holds, by pool."""
        if not self.closed:
            yield self.target, self.there + self.target_pages
            yield self.tier, [each.page for each in self.pages]

    def close(self) -> None:
        """Let go of everything at both ends. What has been written can be found; what is on its
        way is dropped first, since others may have its pages next."""
        self.closed = True
        self.drop(self)
        self.target.allocator.free(self.there + self.target_pages)
        self.tier.allocator.free([each.page for each in self.pages])
