"""A call that a request forces: decoding is held to an object, and the answer is nothing else."""

from collections.abc import Set

from pdjax.serving.parsers.calls import attempt, call_object
from pdjax.serving.parsers.cursor import Cursor, Reading


def read_forced(cursor: Cursor, names: Set[str]) -> Reading[None]:
    """Read a call of one of the tools."""
    yield from cursor.hold_space()
    if (yield from cursor.peek()) == "{":
        cursor.keep()
        yield from attempt(cursor, call_object(cursor, names))
    yield from cursor.rest()
