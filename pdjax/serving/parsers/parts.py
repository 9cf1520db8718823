"""What a parser tells of an answer's text, in the order in which it was written."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the reader of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of this tool; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Further characters of the arguments of the call that began last: JSON, as it was written."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """The call that began last is whole."""


@dataclass(frozen=True, slots=True)
class NoCall:
    """What looked like a call is none, or the answer ended within it.

    Attributes:
      text: all of it, as it was written.
      untold: the end of `text` that neither `CallBegins` nor `Arguments` has told of; all of it
        where the call has not begun.
    """

    text: str
    untold: str


Part = Text | Reasoning | CallBegins | Arguments | CallEnds | NoCall
