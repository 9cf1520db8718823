"""What a syntax of reasoning is."""

from collections.abc import Callable
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
