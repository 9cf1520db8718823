"""Capacity goodput: the highest rate at which enough requests are good, from runs at some rates."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Point(NamedTuple):
    """A run at one rate.

    Attributes:
      rate: requests a second that were offered.
      good: requests that met every SLO.
      total: of all requests, failed and shed ones included.
    """

    rate: float
    good: int
    total: int


@dataclass(frozen=True)
class Capacity:
    """What runs at some rates say.

    Attributes:
      share: of the requests that must be good.
      points: one a rate, in the order of rates.
    """

    share: float
    points: tuple[Point, ...]

    def holds(self, point: Point) -> bool:
        """Whether enough requests were good. A run without requests says nothing, so it does not
        hold."""
        # 9 of 10 are 90%, whatever 0.9 is in binary.
        return point.total > 0 and point.good >= self.share * point.total - 1e-9

    @property
    def best(self) -> Point | None:
        """The highest rate up to which every rate holds; None where the lowest does not."""
        best = None
        for point in self.points:
            if not self.holds(point):
                break
            best = point
        return best

    @property
    def next(self) -> Point | None:
        """The lowest rate that does not hold; None where all do."""
        return next((point for point in self.points if not self.holds(point)), None)

    @property
    def interpolated(self) -> float | None:
        """Where the line between those two crosses the share (Zhong et al. 2024); None where one is
        missing."""
        best, worse = self.best, self.next
        if best is None or worse is None or not worse.total:
            return None
        high, low = best.good / best.total, worse.good / worse.total
        return best.rate + (worse.rate - best.rate) * (high - self.share) / (high - low)

    def to_json(self, chips: int | None) -> dict[str, Any]:
        """Plain values under the keys of `definitions.CAPACITY`; `chips`: all of both phases."""
        best = self.best
        return {
            "rate": best.rate if best else None,
            "share": self.share,
            "good": best.good if best else None,
            "total": best.total if best else None,
            "interpolated": self.interpolated,
            "per_gpu": best.rate / chips if best and chips else None,
            "points": [point._asdict() for point in self.points],
        }


def capacity(points: Iterable[Point], share: float = 0.9) -> Capacity:
    """What a sweep says; points of one rate, as of several seeds, are added up.

    Raises:
      ValueError: a share that is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: must be in (0, 1]")
    pooled: dict[float, Point] = {}
    for rate, good, total in points:
        before = pooled.get(rate, Point(rate, 0, 0))
        pooled[rate] = Point(rate, before.good + good, before.total + total)
    return Capacity(share, tuple(pooled[rate] for rate in sorted(pooled)))


def find_capacity(
    measure: Callable[[float], Point],
    start: float,
    share: float = 0.9,
    *,
    resolution: float = 0.05,
    doublings: int = 10,
) -> Capacity:
    """Search by bisection: from `start` by factors of two until one rate holds and a higher one
    does not, then between the two.

    Args:
      measure: runs at a rate.
      start: the first rate.
      share: of the requests that must be good.
      resolution: ends when the two are closer than this, as a part of the lower one.
      doublings: most steps by a factor of two; where the outcome is the same after them, the search
        ends without the other side.

    Raises:
      ValueError: a rate, share or resolution out of range.
    """
    for name, value in (("start", start), ("resolution", resolution)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value}: must be more than 0")
    points = [measure(start)]
    first = found = capacity(points, share)
    up = first.best is not None
    for _ in range(doublings):
        if (found.best is not None) and (found.next is not None):
            break
        rate = points[-1].rate * (2.0 if up else 0.5)
        points.append(measure(rate))
        found = capacity(points, share)
    best, worse = found.best, found.next
    while best and worse and worse.rate - best.rate > resolution * best.rate:
        points.append(measure((best.rate + worse.rate) / 2))
        found = capacity(points, share)
        best, worse = found.best, found.next
    return found
