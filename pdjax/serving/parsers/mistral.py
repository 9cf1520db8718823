"""Calls as Mistral's models write them: behind a marker a list of objects, or a name and its
arguments, as since the tokenizer's version 11."""

from collections.abc import Set

from pdjax.serving.parsers.calls import ToolSyntax, attempt, call_object, object_of_arguments
from pdjax.serving.parsers.cursor import Cursor, Malformed, Reading

_MARKER, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def _fits(template: str) -> bool:
    return _MARKER in template


def _read(cursor: Cursor, names: Set[str]) -> Reading[None]:
    while (yield from cursor.text_before(_MARKER)):
        yield from cursor.space()
        if not (yield from cursor.literal("[")):
            if (yield from attempt(cursor, _named(cursor))):
                yield from cursor.space()
            continue
        while (yield from attempt(cursor, call_object(cursor))):
            yield from cursor.space()
            cursor.keep()
            if not (yield from cursor.literal(",")):
                cursor.drop()
                yield from cursor.literal("]")
                yield from cursor.space()
                break


def _named(cursor: Cursor) -> Reading[None]:
    """Read a call that is a name, perhaps an id, and arguments.

    Raises:
      Malformed: it is none.
    """
    name = yield from cursor.word(_is_of_name)
    yield from cursor.space()
    if (yield from cursor.literal(_ID)):
        yield from cursor.word(str.isalnum)
    if not name or not (yield from cursor.literal(_ARGUMENTS)):
        raise Malformed
    yield from cursor.space()
    yield from object_of_arguments(cursor, name)


def _is_of_name(character: str) -> bool:
    return character.isprintable() and character not in "[]{} "


MISTRAL = ToolSyntax((_MARKER, _ID, _ARGUMENTS), _fits, _read, "arguments")
