"""What a syntax of reasoning is, and how many tokens a choice's reasoning has."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pdjax.serving.parsers.cursor import Cursor, Reading


@dataclass(frozen=True)
class ReasoningSyntax:
    """How models of one family write their reasoning.

    Attributes:
      opens, closes: the markers around it. They may be control tokens, which have to be shown for
        the parser.
      fits: whether a chat template is of this family.
      is_open: whether a prompt that ends so has begun the reasoning.
      read: reads a text, from its start to its end, given whether the prompt has begun the
        reasoning.
    """

    opens: str
    closes: str
    fits: Callable[[str], bool]
    is_open: Callable[[str], bool]
    read: Callable[[Cursor, bool], Reading[None]]


class ReasoningCount:
    """Counts the tokens of one choice's reasoning, without the markers around it.

    Args:
      opens, closes: the tokens of the markers.
      is_open: whether the prompt has begun the reasoning.
      is_space: whether a token is white space, which may stand before the reasoning.

    Attributes:
      tokens: how many so far.
      is_open: whether the reasoning goes on.
    """

    def __init__(
        self, opens: int, closes: int, is_open: bool, is_space: Callable[[int], bool]
    ) -> None:
        self._opens, self._closes, self._is_space = opens, closes, is_space
        self.tokens, self.is_open = 0, is_open
        self._may_open = not is_open

    def push(self, token_ids: Iterable[int]) -> None:
        """Take further tokens of the choice."""
        for token in token_ids:
            if self.is_open:
                self.is_open = token != self._closes
                self.tokens += self.is_open
            elif self._may_open:
                self.is_open = token == self._opens
                self._may_open = not self.is_open and self._is_space(token)
            else:
                return
