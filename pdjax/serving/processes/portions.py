"""Pieces of answers as a front takes them: a long one in portions, so that its event loop does
other things between them."""

import asyncio
from collections import deque
from collections.abc import Callable

from pdjax.serving.processes.messages import Piece

PORTION = 256
"""Tokens whose text is made at once: some 2 ms of the event loop."""


class Portions:
    """Hands pieces on, those of an answer in their order. A short piece is handed on at once,
    unless its answer waits. Of the others a portion is handed on each time the event loop comes
    round, of one answer after the other. Belongs to the event loop in which it is made.

    Args:
      deliver: called with each portion, itself a piece.
    """

    def __init__(self, deliver: Callable[[Piece], None]) -> None:
        self._deliver, self._loop = deliver, asyncio.get_running_loop()
        self._waiting: dict[int, deque[Piece]] = {}  # by answer; the first one is the next

    def take(self, piece: Piece) -> None:
        """Take what is new of a choice."""
        number, _, token_ids, *_ = piece
        if number not in self._waiting and len(token_ids) <= PORTION:
            self._deliver(piece)
            return
        if not self._waiting:
            self._loop.call_soon(self._go_on)
        self._waiting.setdefault(number, deque()).append(piece)

    def _go_on(self) -> None:
        number, pieces = next(iter(self._waiting.items()))
        del self._waiting[number]
        first, rest = _cut(pieces.popleft())
        if rest is not None:
            pieces.appendleft(rest)
        if pieces:
            self._waiting[number] = pieces
        if self._waiting:
            self._loop.call_soon(self._go_on)
        self._deliver(first)


def _cut(piece: Piece) -> tuple[Piece, Piece | None]:
    """A portion, and the rest. The end of a choice comes with its last token."""
    number, choice, token_ids, logprobs, ending = piece
    if len(token_ids) <= PORTION:
        return piece, None
    of_first = of_rest = None
    if logprobs is not None:
        of_first, of_rest = logprobs[:PORTION], logprobs[PORTION:]
    first = (number, choice, token_ids[:PORTION], of_first, None)
    return first, (number, choice, token_ids[PORTION:], of_rest, ending)
