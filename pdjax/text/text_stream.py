"""Turns a sequence's tokens into text as they arrive, and ends the text before a stop string.

Text that has been shown is never taken back. So the stream holds back two things: bytes of a
character that is not whole yet (the decoder does that), and text that may become a stop string.
"""

from collections.abc import Iterable
from typing import Protocol

from pdjax.core.stop_strings import StopStrings


class Decoder(Protocol):
    """Turns token ids into text, piece by piece: `detokenizer.IncrementalDecoder`."""

    def push(self, token_id: int) -> str:
        """Take a token; return the text that is now certain."""
        ...

    def flush(self) -> str:
        """Return the text that was held back, at the end."""
        ...


class TextStream:
    """The text of one sequence.

    The cost of a token grows with its own text, not with the text before it.

    Args:
      decoder: a new decoder, used by this stream alone.
      stop: strings that end the text, not empty; or the `StopStrings` of a request, which its
        choices share.
    """

    def __init__(self, decoder: Decoder, stop: Iterable[str] | StopStrings = ()) -> None:
        self._decoder = decoder
        self._stop = stop if isinstance(stop, StopStrings) else StopStrings(stop)
        self._state = 0  # state of the search for stop strings
        self._pieces: list[str] = []
        self._length = 0  # characters in `_pieces`
        self._fresh: list[str] = []  # text that `take` has not returned yet
        self._waiting = 0  # characters in `_fresh`
        self._finished = False

    @property
    def text(self) -> str:
        """All text so far, cut before a stop string."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token_id: int) -> str | None:
        """Add a token; return the stop string that it completed, if any, which ends the text."""
        assert not self._finished, "the text has ended"
        return self._append(self._decoder.push(token_id))

    def finish(self) -> None:
        """End the text: nothing is held back any longer. A second call does nothing."""
        if not self._finished:
            self._finished = True  # set first: if the decoder fails, `take` returns what is there
            self._append(self._decoder.flush())

    def take(self) -> str:
        """Return the text since the last `take` that no later token can change."""
        held = 0 if self._finished else self._stop.held_back(self._state)
        certain = self._waiting - held
        if certain <= 0:
            return ""
        fresh = "".join(self._fresh)
        self._fresh, self._waiting = [fresh[certain:]], held
        return fresh[:certain]

    def _append(self, piece: str) -> str | None:
        """Add text; cut it before the earliest stop string in it, and return that string."""
        if not piece:
            return None
        self._state, match = self._stop.search(self._state, piece)
        self._pieces.append(piece)
        self._fresh.append(piece)
        before = self._length
        self._length += len(piece)
        self._waiting += len(piece)
        if match is None:
            return None
        self._cut(before + match.start)
        self._finished = True
        return match.stop

    def _cut(self, length: int) -> None:
        """Keep `length` characters; the rest was held back, so `take` has not returned it."""
        surplus = self._length - length
        self._pieces = [self.text[:length]]
        self._fresh = ["".join(self._fresh)[: self._waiting - surplus]]
        self._length, self._waiting = length, self._waiting - surplus
