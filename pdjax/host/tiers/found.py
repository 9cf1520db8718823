"""Where the KV of a sequence goes on below a pool that has only its beginning."""

from collections.abc import Mapping
from dataclasses import dataclass

from pdjax.core.ids import PoolId
from pdjax.host.kv.pools import PoolState
from pdjax.host.kv.prefix_index import PrefixIndex, keys_of
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.transport import KeptPage


@dataclass(frozen=True)
class Found:
    """What is to be brought up next: from a pool's tier to the pool, or, where that tier lacks some
    of it, first from the tier below to the tier.

    Attributes:
      tier, target: where it lies, and where it goes.
      there: pages of the target that are of no use without it, or it without them.
      pages: of the tier, in order.
      ways: all moves until it is in the pool: source, target, pages.
    """

    tier: PoolState
    target: PoolState
    there: list[int]
    pages: list[KeptPage]
    ways: tuple[tuple[PoolState, PoolState, int], ...]

    @property
    def run(self) -> int:
        """Pages that will have come to the pool in the end."""
        return self.ways[-1][2]


def find(
    sequence: Sequence, pool: PoolState, tiers: Mapping[PoolId, PoolState], *, deep: bool
) -> Found | None:
    """What tiers have of a sequence from where a pool's knowledge ends; None where they have
    nothing.

    Args:
      sequence: waits.
      pool: of an engine; it has a tier.
      tiers: of each pool that has one.
      deep: whether the tier below the pool's tier is asked, too.
    """
    index, tier = index_of(pool), tiers[pool.id]
    below = tiers.get(tier.id) if deep else None
    keys = keys_of(sequence, index)[: max(sequence.reusable, 0) // index.page_size]
    known = index.known_tokens(sequence, sequence.reusable) // index.page_size
    if known == len(keys):
        return None
    here, lacking = list[KeptPage](), list[KeptPage]()
    first = len(keys)  # place of the first page that the tier lacks
    room = tier.allocator.free_pages
    for place in range(known, len(keys)):
        key = keys[place]
        page = index_of(tier).page_of(key)
        if page is None and below is not None:
            first, page, pages = min(first, place), index_of(below).page_of(key), lacking
        else:
            pages = here
        # What the tier has is held while the rest comes, which takes room.
        if page is None or (first < len(keys) and len(here) + len(lacking) >= room):
            break
        pages.append(KeptPage(key, place, page))
    if below is not None and lacking:
        ways = (below, tier, len(lacking)), (tier, pool, len(here) + len(lacking))
        return Found(below, tier, [each.page for each in here], lacking, ways)
    if not here:
        return None
    return Found(tier, pool, index.match(keys), here, ((tier, pool, len(here)),))


def index_of(pool: PoolState) -> PrefixIndex:
    """The index of a pool that keeps prefixes."""
    assert pool.prefixes is not None, f"{pool.id} keeps prefixes"
    return pool.prefixes
