"""Finds the end of a JSON value that arrives in pieces, and the first character that is wrong."""

import re

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_CHARACTERS = frozenset("+-.0123456789eE")
_SPACES = re.compile(r"[ \t\n\r]*")
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}

SPACE = " \t\n\r"
"""White space of JSON."""


def end_of_space(text: str, at: int) -> int:
    """The place behind the white space at a place."""
    found = _SPACES.match(text, at)
    return at if found is None else found.end()


class JsonScanner:
    """Reads one value of RFC 8259. What is read does not depend on how the text is cut.

    Attributes:
      ended: whether the value is whole.
      failed: whether the next character can't be part of it.
    """

    def __init__(self) -> None:
        self.ended = self.failed = False
        self._open: list[str] = []  # the brackets that are still to be closed
        self._expects = "value"  # or: first value, first key, key, colon, next
        self._token = ""  # "string", "number" or "word" while one is read
        self._rest = ""  # of a word, what is missing
        self._digits: list[str] = []  # of a number, what was read
        self._escape = 0  # characters of an escape that are missing; -1 for its first one

    def feed(self, text: str, at: int = 0) -> int:
        """Read on in `text` from `at`; return the place behind what belongs to the value."""
        while at < len(text) and not (self.ended or self.failed):
            at = self._in_token(text, at) if self._token else self._between(text, at)
        return at

    def _between(self, text: str, at: int) -> int:
        """Read a character that is part of no string, number or word."""
        character, expects = text[at], self._expects
        if character in SPACE:
            return end_of_space(text, at)
        if character in "]}" and self._open and character == self._open[-1]:
            if expects not in ("next", "first value", "first key"):
                return self._fail(at)
            self._open.pop()
            self._value_ends()
        elif expects in ("value", "first value"):
            return self._begin(character, at)
        elif expects in ("key", "first key") and character == '"':
            self._token, self._expects = "string", "colon"
        elif expects == "colon" and character == ":":
            self._expects = "value"
        elif expects == "next" and character == ",":
            self._expects = "key" if self._open[-1] == "}" else "value"
        else:
            return self._fail(at)
        return at + 1

    def _begin(self, character: str, at: int) -> int:
        """Begin a value."""
        if character == "{":
            self._open.append("}")
            self._expects = "first key"
        elif character == "[":
            self._open.append("]")
            self._expects = "first value"
        elif character == '"':
            self._token, self._expects = "string", "next"
        elif character in "-0123456789":
            self._token, self._digits, self._expects = "number", [character], "next"
        elif character in _WORDS:
            self._token, self._rest, self._expects = "word", _WORDS[character], "next"
        else:
            return self._fail(at)
        return at + 1

    def _in_token(self, text: str, at: int) -> int:
        if self._token == "string":
            return self._in_string(text, at)
        character = text[at]
        if self._token == "word":
            if character != self._rest[0]:
                return self._fail(at)
            self._rest = self._rest[1:]
            if not self._rest:
                self._token = ""
                self._value_ends()
            return at + 1
        if character in _NUMBER_CHARACTERS:
            self._digits.append(character)
            return at + 1
        if _NUMBER.fullmatch("".join(self._digits)) is None:
            return self._fail(at)
        self._token = ""
        self._value_ends()
        return at

    def _in_string(self, text: str, at: int) -> int:
        character = text[at]
        if self._escape < 0:
            self._escape = 4 if character == "u" else 0
            return at + 1 if character in '"\\/bfnrtu' else self._fail(at)
        if self._escape:
            self._escape -= 1
            return at + 1 if character in "0123456789abcdefABCDEF" else self._fail(at)
        plain = _PLAIN.match(text, at)
        if plain is not None and plain.end() > at:
            return plain.end()
        if character == "\\":
            self._escape = -1
        elif character == '"':
            self._token = ""
            if self._expects == "next":
                self._value_ends()
        else:  # a control character
            return self._fail(at)
        return at + 1

    def _value_ends(self) -> None:
        self._expects = "next"
        self.ended = not self._open

    def _fail(self, at: int) -> int:
        self.failed = True
        return at
