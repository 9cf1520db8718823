"""Capture at dispatch, attribute at harvest."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

from pdjax.host.sequences.sequence import Sequence

MOST_NAMED = 32
"""References that `ids_of` spells out: a recorder keeps its spans, and they must stay small."""


class SequenceRef(NamedTuple):
    """A sequence as it was when work was dispatched for it. The outcome is for this sequence, even
    if another one has its place by then, and for none if it has given up the KV that the work was
    about."""

    sequence: Sequence
    epoch: int

    @classmethod
    def of(cls, sequence: Sequence) -> "SequenceRef":
        """The sequence as it is now."""
        return cls(sequence, sequence.epoch)

    @property
    def is_current(self) -> bool:
        """Whether the sequence still has the KV that it had then."""
        return self.epoch == self.sequence.epoch and not self.sequence.done


def current(refs: Iterable[SequenceRef]) -> list[Sequence]:
    """The sequences whose references are current."""
    return [ref.sequence for ref in refs if ref.is_current]


def ids_of(refs: Seq[SequenceRef]) -> str:
    """The ids for a reader, separated by commas: the first ones, and how many more."""
    named = [ref.sequence.id for ref in refs[:MOST_NAMED]]
    more = len(refs) - len(named)
    return ", ".join(named + [f"and {more} more"] * bool(more))
