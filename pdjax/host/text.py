"""Tokens become text as they come, and the text ends before the first stop string.

What is shown while it streams must never be taken back. So two things are held back: bytes of a
character that is not whole yet (the decoder does that), and text that may yet become a stop string.
"""

from typing import Protocol


class Decoder(Protocol):
    """Turns token ids into text, piece by piece: `tokenizer.IncrementalDecoder`."""

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token."""
        ...

    def flush(self) -> str:
        """What was held back, at the end."""
        ...


class TextStream:
    """The text of one sequence.

    Args:
      decoder: fresh; used by this stream alone.
      stop: strings that end the text, not empty.
    """

    def __init__(self, decoder: Decoder, stop: tuple[str, ...] = ()) -> None:
        self._decoder = decoder
        self._stop = stop
        self._reach = max(map(len, stop), default=1) - 1  # of a stop string into earlier text
        self._text = ""
        self._taken = 0
        self._finished = False

    @property
    def text(self) -> str:
        """All text so far, cut before a stop string."""
        return self._text

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
        end = len(self._text) - (0 if self._finished else self._held_back())
        delta = self._text[self._taken : end]
        self._taken += len(delta)
        return delta

    def _append(self, piece: str) -> str | None:
        """Add text; cut it before the earliest stop string in it, and return that."""
        start = max(0, len(self._text) - self._reach)
        self._text += piece
        if not self._stop:
            return None
        found = ((self._text.find(stop, start), stop) for stop in self._stop)
        # Where two begin at the same place, one is the start of the other: the shorter comes first.
        matches = sorted(match for match in found if match[0] >= 0)
        if not matches:
            return None
        where, stop = matches[0]
        self._text = self._text[:where]
        self._finished = True
        return stop

    def _held_back(self) -> int:
        """Characters at the end of the text with which a stop string begins."""
        for length in range(min(self._reach, len(self._text)), 0, -1):
            tail = self._text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0
