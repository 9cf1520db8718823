"""The part of a prompt that one prefill step computes."""

from dataclasses import dataclass

from pdjax.host.sequences.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The tokens `[start, stop)` of a sequence, to be prefilled in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many."""
        return self.stop - self.start

    @property
    def last(self) -> bool:
        """Whether the sequence is prefilled after it, so that its next token can be chosen."""
        return self.stop == self.sequence.length
