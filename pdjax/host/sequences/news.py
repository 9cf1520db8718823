"""What is new of a sequence since it was last told of."""

from typing import NamedTuple

from pdjax.host.sequences.sequence import Sequence


class Progress(NamedTuple):
    """What is new of a sequence: its tokens from the `start`-th up to the `stop`-th, and whether it
    is done."""

    sequence: Sequence
    start: int
    stop: int
    finished: bool

    @property
    def token_ids(self) -> list[int]:
        """Its further tokens, cut out only when they are asked for."""
        return self.sequence.output[self.start : self.stop]
