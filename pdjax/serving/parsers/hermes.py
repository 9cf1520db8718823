"""Calls as Hermes 2 Pro and Qwen 2.5 and 3 write them: an object between tags, a pair a call."""

from collections.abc import Set

from pdjax.serving.parsers.calls import ToolSyntax, attempt, call_object
from pdjax.serving.parsers.cursor import Cursor, Reading

_OPENS, _CLOSES = "<tool_call>", "</tool_call>"
_OTHERS = ("<function=", "<arg_key>")
"""What templates of other families hold, whose calls stand between the same tags."""


def _fits(template: str) -> bool:
    return _OPENS in template and not any(other in template for other in _OTHERS)


def _read(cursor: Cursor, names: Set[str]) -> Reading[None]:
    while (yield from cursor.text_before(_OPENS)):
        if (yield from attempt(cursor, call_object(cursor))):
            yield from cursor.space()
            if (yield from cursor.literal(_CLOSES)):  # some models leave it out
                yield from cursor.space()


HERMES = ToolSyntax((_OPENS, _CLOSES), _fits, _read, "arguments")
