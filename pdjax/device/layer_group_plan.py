"""Into how many layer groups a prefill step is cut: arithmetic, without any device."""

from collections.abc import Iterable
from dataclasses import dataclass

MOST_GROUPS = 16
"""Beyond that a group is too little work for what dispatching it costs."""

NO_DIFFERENCE_S = 1e-4
"""What it is not worth to cut further for: a transfer job costs the host several times as much."""

UNEVEN_GAIN = 0.9
"""Groups of unequal size need a second program: they must end in less than this share of the time
of equal ones."""


@dataclass(frozen=True)
class Link:
    """The way from one mesh to another: a put of n bytes takes latency_s + n / bytes_per_s."""

    latency_s: float
    bytes_per_s: float

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> "Link":
        """Through two measurements (bytes, seconds). Where they are too noisy for a line, all of
        the larger one's time counts as its rate."""
        (small, short), (large, long) = few, many
        if not 0 < short < long:
            return cls(0.0, large / long)
        rate = (large - small) / (long - short)
        return cls(max(0.0, short - small / rate), rate)


def plan_groups(
    num_layers: int, wire_bytes: int, link: Link, prefill_s: float, overhead_s: float
) -> int:
    """The number of groups with which the last byte of a step is predicted to arrive first; fewer
    of them if that makes next to no difference (`NO_DIFFERENCE_S`).

    The model: G equal groups are computed one after another, and each goes over a wire that takes
    one at a time.

        group g is computed at     (g + 1) * prefill_s / G + g * overhead_s
        and has arrived after      latency_s + wire_bytes / (G * bytes_per_s)
        from when it is computed and the wire is free.

    So with one group nothing overlaps, and with many each costs its overhead and latency.

    Args:
      num_layers: of the model. Its divisors make groups of equal size, which share a program;
        another number must be worth a second one.
      wire_bytes: what a step writes, as it travels; over the busiest link, if there are several.
      link: from the prefill mesh to the decode mesh.
      prefill_s: what a step takes in one piece.
      overhead_s: what one more group adds to that.
    """

    def end(groups: int) -> float:
        wire_s = link.latency_s + wire_bytes / (groups * link.bytes_per_s)
        free = 0.0
        for group in range(groups):
            computed = (group + 1) * prefill_s / groups + group * overhead_s
            free = max(computed, free) + wire_s
        return free

    def first(counts: Iterable[int]) -> int:
        ends = {count: end(count) for count in counts}
        soon = min(ends.values()) + NO_DIFFERENCE_S
        return min(count for count, moment in ends.items() if moment <= soon)

    counts = range(1, min(num_layers, MOST_GROUPS) + 1)
    equal = first(count for count in counts if num_layers % count == 0)
    other = first(counts)
    return other if end(other) < UNEVEN_GAIN * end(equal) else equal


def small_divisor(num_layers: int) -> int:
    """The largest number of equal groups up to 4: what to take where timing means nothing."""
    return max(count for count in range(1, 5) if num_layers % count == 0)
