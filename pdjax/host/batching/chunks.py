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
    def scored(self) -> range:
        """The tokens of the prompt, by their places, whose log-probabilities it brings."""
        scores = self.sequence.prompt_scores
        return range(0) if scores is None else scores.told_by(self.start, self.stop)

    @property
    def last(self) -> bool:
        """Whether the sequence is prefilled after it, so that its next token can be chosen."""
        return self.stop == self.sequence.length
