"""Which sequence gives up its pages first when a decode pool is full."""

from collections.abc import Callable
from math import inf

from pdjax.host.sequences.sequence import Sequence

Key = Callable[[Sequence], tuple[float, int]]
"""Whose is greatest gives way first; of equals the youngest."""


def youngest(sequence: Sequence) -> tuple[float, int]:
    """As vLLM's recompute (Kwon et al. 2023): the oldest always gets on."""
    return 0.0, sequence.order


def lowest_priority(sequence: Sequence) -> tuple[float, int]:
    """The class that is served last, as vLLM's priority scheduling preempts."""
    return sequence.request.priority, sequence.order


def most_pages(sequence: Sequence) -> tuple[float, int]:
    """The one that frees most, so that fewest give way, at the price of the longest recompute."""
    return len(sequence.pages), sequence.order


def latest_deadline(sequence: Sequence) -> tuple[float, int]:
    """The one that has most time, and before it those without a deadline."""
    request = sequence.request
    due = inf if request.deadline is None else request.arrival + request.deadline
    return due, sequence.order


VICTIMS: dict[str, Key] = {
    "youngest": youngest,
    "lowest_priority": lowest_priority,
    "most_pages": most_pages,
    "latest_deadline": latest_deadline,
}
"""By the names of `policies.victim`. Every prefill, that of a victim too, yields a token; so with
any of them no sequence is recomputed for ever."""
