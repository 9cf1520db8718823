"""What the syntaxes of calls share: a call as a JSON object, and its undoing."""

import json
from collections.abc import Callable, Set
from dataclasses import dataclass

from pdjax.serving.parsers.cursor import Cursor, Malformed, Reading
from pdjax.serving.parsers.parts import Arguments, CallBegins, CallEnds

ARGUMENTS = ("arguments", "parameters")
"""Keys that may hold the arguments of a call."""


@dataclass(frozen=True)
class ToolSyntax:
    """How models of one family write calls.

    Attributes:
      markers: texts that may be control tokens, which have to be shown for the parser.
      fits: whether a chat template is of this family.
      read: reads a text, from its start to its end, given the names of the tools that were offered.
      arguments: the key under which models of the family write a call's arguments.
    """

    markers: tuple[str, ...]
    fits: Callable[[str], bool]
    read: Callable[[Cursor, Set[str]], Reading[None]]
    arguments: str


def attempt(cursor: Cursor, call: Reading[None]) -> Reading[bool]:
    """Read a call from where the cursor keeps what it reads; whether it is one. What is none is
    told as that."""
    try:
        yield from call
    except Malformed:
        yield cursor.no_call()
        return False
    cursor.drop()
    yield CallEnds()
    return True


def call_object(cursor: Cursor, names: Set[str] | None = None) -> Reading[None]:
    """Read a call that is an object with a name and arguments, in any order. Other keys are passed
    over.

    Args:
      cursor: is before the object, or before white space.
      names: the tools that may be called, where nothing else tells a call from an object; then no
        other key than "id" and "type" may be there. None takes any name.

    Raises:
      Malformed: it is none.
    """
    yield from _expect(cursor, "{")
    name = arguments = None
    while True:
        key = yield from _string(cursor)
        yield from _expect(cursor, ":")
        yield from cursor.space()
        if key == "name" and name is None:
            name = yield from _string(cursor)
            if not (name and name.isprintable()) or (names is not None and name not in names):
                raise Malformed
            if arguments is not None:
                yield from _begin(cursor, name, arguments)
        elif key in ARGUMENTS and arguments is None:
            arguments = yield from object_of_arguments(cursor, name)
        elif names is None or key in ("id", "type"):
            yield from cursor.json_value()
        else:
            raise Malformed
        yield from cursor.space()
        if not (yield from cursor.literal(",")):
            break
    yield from _expect(cursor, "}")
    if name is None:
        raise Malformed
    if arguments is None:
        yield from _begin(cursor, name, "{}")


def object_of_arguments(cursor: Cursor, name: str | None) -> Reading[str]:
    """Read the arguments of a call: an object, which is told as it comes where the name is known
    already.

    Raises:
      Malformed: it is none.
    """
    if (yield from cursor.peek()) != "{":
        raise Malformed
    if name is not None:
        cursor.told()
        yield CallBegins(name)
    return (yield from cursor.json_value(tells=name is not None))


def _begin(cursor: Cursor, name: str, arguments: str) -> Reading[None]:
    cursor.told()
    yield CallBegins(name)
    yield Arguments(arguments)


def _expect(cursor: Cursor, character: str) -> Reading[None]:
    yield from cursor.space()
    if not (yield from cursor.literal(character)):
        raise Malformed


def _string(cursor: Cursor) -> Reading[str]:
    yield from cursor.space()
    if (yield from cursor.peek()) != '"':
        raise Malformed
    found: str = json.loads((yield from cursor.json_value()))
    return found
