"""The place of a parser in a text that arrives in pieces.

A parser is a generator: it yields parts, and None where it needs more text. It never decides before
the text is certain, so that what it tells does not depend on where the text is cut.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

from pdjax.serving.parsers.json_scanner import SPACE, JsonScanner, end_of_space
from pdjax.serving.parsers.parts import Arguments, NoCall, Part, Reasoning, Text

ResultT = TypeVar("ResultT")
Reading = Generator[Part | None, None, ResultT]


class Malformed(Exception):
    """The text is not of the form that was expected; the place is before what is wrong."""


class Cursor:
    """Text that has come and was not read yet.

    White space is held until it is known whether a call follows: beside a call it belongs to the
    form of calls and is not told.

    Attributes:
      ended: whether no text follows.
    """

    def __init__(self) -> None:
        self.ended = False
        self._text, self._at = "", 0
        self._held: list[str] = []  # white space before the place
        self._kept: list[str] | None = None  # what was read since `keep`
        self._told = 0  # how many of `_kept` were told

    def add(self, text: str) -> None:
        """Text has come."""
        self._text, self._at = self._text[self._at :] + text, 0

    def peek(self) -> Reading[str]:
        """The next character; "" at the end."""
        while self._at == len(self._text):
            if self.ended:
                return ""
            yield None
        return self._text[self._at]

    def space(self) -> Reading[None]:
        """Read white space, which is not told."""
        while (character := (yield from self.peek())) and character in SPACE:
            self._take_space()

    def hold_space(self) -> Reading[None]:
        """Read white space, which is told later, unless a call follows."""
        while (character := (yield from self.peek())) and character in SPACE:
            self._held.append(self._take_space())

    def literal(self, text: str) -> Reading[bool]:
        """Read `text` if it comes next; whether it did."""
        while True:
            found = self._text[self._at : self._at + len(text)]
            if found == text:
                self._take(len(text))
                return True
            if self.ended or not text.startswith(found):
                return False
            yield None

    def word(self, allowed: Callable[[str], bool]) -> Reading[str]:
        """Read the characters that are allowed, up to the first one that is not."""
        pieces = []
        while (character := (yield from self.peek())) and allowed(character):
            pieces.append(self._take(1))
        return "".join(pieces)

    def json_value(self, tells: bool = False) -> Reading[str]:
        """Read a value, and return it; or tell it as arguments while it comes.

        Raises:
          Malformed: it is none.
        """
        scanner, pieces = JsonScanner(), []
        while not scanner.ended:
            if not (yield from self.peek()):
                raise Malformed
            piece = self._take(scanner.feed(self._text, self._at) - self._at)
            if tells and piece:
                self.told()
                yield Arguments(piece)
            elif piece:
                pieces.append(piece)
            if scanner.failed:
                raise Malformed
        return "".join(pieces)

    def text_before(self, marker: str, kind: type[Text] | type[Reasoning] = Text) -> Reading[bool]:
        """Tell the text before a marker, and read the marker; whether there was one. From the white
        space before it on, what is read is kept."""
        while True:
            found = self._text.find(marker, self._at)
            end = found if found >= 0 else self._certain(marker)
            piece = self._take(end - self._at)
            body = piece.rstrip(SPACE)
            if body:
                yield kind("".join([*self._held, body]))
                self._held = []
            if len(body) < len(piece):
                self._held.append(piece[len(body) :])
            if found >= 0:
                self.keep()
                self._take(len(marker))
                return True
            if self.ended:
                if self._held:
                    yield kind("".join(self._held))
                    self._held = []
                return False
            yield None

    def rest(self) -> Reading[None]:
        """Tell all that comes."""
        while True:
            piece = "".join([*self._held, self._take(len(self._text) - self._at)])
            self._held = []
            if piece:
                yield Text(piece)
            if self.ended:
                return
            yield None

    def keep(self) -> None:
        """Keep what is read from here on, and the white space before it."""
        self._kept, self._held, self._told = self._held, [], 0

    def told(self) -> None:
        """What was read has been told as a call."""
        if self._kept is not None:
            self._told = len(self._kept)

    def drop(self) -> None:
        """What was kept is part of a call's form."""
        self._kept, self._held = None, []

    def no_call(self) -> NoCall:
        """What was kept is no call."""
        kept = self._kept or []
        self._kept = None
        return NoCall("".join(kept), "".join(kept[self._told :]))

    def _take(self, count: int) -> str:
        piece = self._text[self._at : self._at + count]
        self._at += count
        if self._kept is not None and piece:
            self._kept.append(piece)
        return piece

    def _take_space(self) -> str:
        return self._take(end_of_space(self._text, self._at) - self._at)

    def _certain(self, marker: str) -> int:
        """The place before which no marker begins whose end has not come."""
        length = len(self._text)
        if self.ended:
            return length
        for start in range(max(self._at, length - len(marker) + 1), length):
            if marker.startswith(self._text[start:]):
                return start
        return length


class Parser:
    """Reads one text.

    Args:
      read: makes the parser's generator.
    """

    def __init__(self, read: Callable[[Cursor], Reading[None]]) -> None:
        self._cursor = Cursor()
        self._reading = read(self._cursor)

    def push(self, text: str) -> list[Part]:
        """Take further text; return what is certain now."""
        self._cursor.add(text)
        return self._run()

    def finish(self) -> list[Part]:
        """End the text; return what was held back."""
        self._cursor.ended = True
        return self._run()

    def _run(self) -> list[Part]:
        parts = []
        for part in self._reading:
            if part is None:
                break
            parts.append(part)
        return parts
