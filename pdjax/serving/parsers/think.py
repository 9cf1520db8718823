"""Reasoning as Qwen 3 and DeepSeek-R1 write it: before the answer, between tags, the first of which
may be the end of the prompt."""

from pdjax.serving.parsers.cursor import Cursor, Reading
from pdjax.serving.parsers.json_scanner import SPACE
from pdjax.serving.parsers.parts import Reasoning
from pdjax.serving.parsers.reasoning import ReasoningSyntax

_OPENS, _CLOSES = "<think>", "</think>"


def _fits(template: str) -> bool:
    return _CLOSES in template


def _is_open(prompt_end: str) -> bool:
    return prompt_end.rstrip(SPACE).endswith(_OPENS)


def _read(cursor: Cursor, is_open: bool) -> Reading[None]:
    if not is_open:
        yield from cursor.hold_space()
        is_open = yield from cursor.literal(_OPENS)
    if is_open:
        cursor.drop()
        yield from cursor.space()
        if (yield from cursor.text_before(_CLOSES, Reasoning)):
            cursor.drop()
            yield from cursor.space()
    yield from cursor.rest()


THINK = ReasoningSyntax(_OPENS, _CLOSES, _fits, _is_open, _read)
