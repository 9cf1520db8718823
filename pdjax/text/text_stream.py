"""Tokens become text as they come, and the text ends before the first stop string.

What is shown while it streams must never be taken back. So two things are held back: bytes of a
character that is not whole yet (the decoder does that), and text that may yet become a stop string.
"""

from collections.abc import Iterable
from typing import Protocol

from pdjax.core.stop_strings import StopStrings


class Decoder(Protocol):
    """Turns token ids into text, piece by piece: `detokenizer.IncrementalDecoder`."""

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token."""
        ...

    def flush(self) -> str:
        """What was held back, at the end."""
        ...


class TextStream:
    """The text of one sequence.

    A token costs as much as its text is long, however long the text before it is.

    Args:
      decoder: fresh; used by this stream alone.
      stop: strings that end the text, not empty; or those of a request, which its choices share.
    """

    def __init__(self, decoder: Decoder, stop: Iterable[str] | StopStrings = ()) -> None:
        self._decoder = decoder
        self._stop = stop if isinstance(stop, StopStrings) else StopStrings(stop)
        self._state = 0  # of the search for stop strings
        self._pieces: list[str] = []
        self._length = 0  # characters in all pieces
        self._fresh: list[str] = []  # what `take` has not given yet
        self._waiting = 0  # characters in all of those
        self._finished = False

    @property
    def text(self) -> str:
        """All text so far, cut before a stop string."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token_id: int) -> str | None:
        """Add a token; returns the stop string that it completed, which finishes the text."""
        assert not self._finished, "the text has ended"
        return self._append(self._decoder.push(token_id))

    def finish(self) -> None:
        """No more tokens come: nothing is held back any longer. Does nothing a second time."""
        if not self._finished:
            self._finished = True  # even if the decoder breaks: `take` gives what there is
            self._append(self._decoder.flush())

    def take(self) -> str:
        """The text since the last `take` that no later token can change."""
        held = 0 if self._finished else self._stop.held_back(self._state)
        certain = self._waiting - held
        if certain <= 0:
            return ""
        fresh = "".join(self._fresh)
        self._fresh, self._waiting = [fresh[certain:]], held
        return fresh[:certain]

    def _append(self, piece: str) -> str | None:
        """Add text; cut it before the earliest stop string in it, and return that."""
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
        """Keep `length` characters; the rest has been held back, so that nobody has taken it."""
        surplus = self._length - length
        self._pieces = [self.text[:length]]
        self._fresh = ["".join(self._fresh)[: self._waiting - surplus]]
        self._length, self._waiting = length, self._waiting - surplus
