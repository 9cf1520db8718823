"""Capture at dispatch, attribute at harvest."""

from dataclasses import dataclass

from pdjax.request import Sequence


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
