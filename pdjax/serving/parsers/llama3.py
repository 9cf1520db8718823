"""Calls as Llama 3.1, 3.2 and 3.3 write them: an object that is the whole answer, or one behind a
marker. Several are separated by semicolons, as vLLM reads them."""

from collections.abc import Set

from pdjax.serving.parsers.calls import ToolSyntax, attempt, call_object
from pdjax.serving.parsers.cursor import Cursor, Reading

_MARKER = "<|python_tag|>"


def _fits(template: str) -> bool:
    return "<|start_header_id|>" in template and '"parameters"' in template


def _read(cursor: Cursor, names: Set[str]) -> Reading[None]:
    yield from cursor.hold_space()
    if (yield from cursor.peek()) == "{":
        cursor.keep()
        yield from _calls(cursor, names)
    while (yield from cursor.text_before(_MARKER)):
        yield from _calls(cursor, None)


def _calls(cursor: Cursor, names: Set[str] | None) -> Reading[None]:
    while (yield from attempt(cursor, call_object(cursor, names))):
        yield from cursor.space()
        cursor.keep()
        if not ((yield from cursor.literal(";")) or (yield from cursor.peek()) == "{"):
            cursor.drop()
            return


LLAMA3 = ToolSyntax((_MARKER,), _fits, _read, "parameters")
