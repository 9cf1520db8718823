"""What open hand-offs could give up, as a policy sees it."""

from collections.abc import Iterable

from pdjax.host.handoff.handoff import Handoff, Purpose
from pdjax.host.kv.pools import PoolState
from pdjax.host.policies.api import Reservation


def reservations_in(pool: PoolState, handoffs: Iterable[Handoff]) -> dict[Reservation, Handoff]:
    """The pages of a pool that hand-offs hold and do not need, or not yet."""
    return {_reservation(each, pool): each for each in handoffs if _gives_up(each, pool)}


def _reservation(handoff: Handoff, pool: PoolState) -> Reservation:
    return Reservation(
        handoff.id,
        handoff.sequence,
        sum(len(pages) for holder, pages in handoff.held() if holder is pool),
        handoff.purpose is Purpose.CACHE,
        handoff.opened,
    )


def _gives_up(handoff: Handoff, pool: PoolState) -> bool:
    """Whether a hand-off holds pages of a pool that it does not need, or not yet."""
    if handoff.purpose is Purpose.CACHE:
        return pool in (handoff.source, handoff.target)
    return handoff.target is pool and handoff.departed is None
