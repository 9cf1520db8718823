"""Capture at dispatch, attribute at harvest."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from pdjax.host.sequences.sequence import Sequence

MOST_NAMED = 32
"""Members that `names` spells out: a recorder keeps its spans, and they must stay small."""


@dataclass(frozen=True)
class Member:
    """A sequence as it was when work was dispatched for it. What comes back is for it, whoever has
    its place by then, and for nobody if it has given up the KV that the work was about."""

    sequence: Sequence
    epoch: int

    @classmethod
    def of(cls, sequence: Sequence) -> "Member":
        """The sequence as it is now."""
        return cls(sequence, sequence.epoch)

    @property
    def current(self) -> bool:
        """Whether it is still as it was."""
        return self.epoch == self.sequence.epoch and not self.sequence.done


def names(members: Seq[Member]) -> str:
    """Their ids for a reader, separated by commas; of a crowd the first, and how many more."""
    named = [member.sequence.id for member in members[:MOST_NAMED]]
    more = len(members) - len(named)
    return ", ".join(named + [f"and {more} more"] * bool(more))
