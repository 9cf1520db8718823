"""What a hostile or careless hand may put where a value, a name, a text or a file is expected."""

import contextlib
import math
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

SECONDS = 1.0
"""Time of the processor in which each answer must be there."""
MOST_MEMORY = 1 << 30
"""Bytes by which a run of cases may let the process grow."""
MOST_CHARACTERS = 2000
"""Of a message."""


def cases(usual: int) -> range:
    """Seeds of a run: `usual` of them, or PDJAX_FUZZ_CASES."""
    return range(int(os.environ.get("PDJAX_FUZZ_CASES", usual)))


class BadRepr:
    """An object that cannot describe itself."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


def ring() -> dict[str, Any]:
    """A dict that holds itself."""
    made: dict[str, Any] = {}
    made["model"] = made["rows"] = made
    return made


INTEGERS = (0, 1, -1, 2, 3, 7, 16, 255, 2**16, 2**31 - 1, 2**31, 2**40, 10**12, 2**63, 10**5000)
FLOATS = (0.0, -0.0, 0.5, 1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324, 1e-9)
TEXTS = (
    *("", " ", "None", "True", "true", "false", "nan", "inf", "1e999", "-1", "0x10", "1_000", "٣"),
    *("[", "(" * 300, "-" * 1500, "9" * 1900, "9" * 50_000, "[" * 100_000, "(1, 2, 3)", "(3, 2)"),
    *("{[]: 1}", "{1: {2: {}}}", "1if 1else 2", "lambda: 0", "b'x'", "...", "'", "\\N{", "f'{1}'"),
    *(
        "\x00",
        "a\x00b",
        "\n",
        "a\nb",
        "\ud800",
        "\u2028",
        "🔥",
        "../..",
        "/",
        "x" * 300,
        "()",
        "(1,)",
    ),
    *("float32", "int8", "random", "smollm2", "__class__", "__init__", "config"),
)


def integer(draw: random.Random) -> int:
    """A whole number, often at a limit."""
    return draw.choice(INTEGERS) + draw.choice((0, 0, 1, -1))


def text(draw: random.Random) -> str:
    """Text that means nothing, or too much."""
    return draw.choice(TEXTS)


def value(draw: random.Random, depth: int = 2) -> Any:
    """Anything that Python can hold."""
    kinds: list[Callable[[], Any]] = [
        lambda: integer(draw),
        lambda: draw.choice(FLOATS),
        lambda: text(draw),
        lambda: draw.choice((None, True, False, b"x", object(), int, BadRepr(), ring(), len)),
        lambda: draw.choice((np.int64(4), np.float32("nan"), np.zeros(3), np.array(2))),
        lambda: tuple(sorted(draw.choices((1, 4, 8, 64, 512, 2**40, True), k=draw.randint(0, 5)))),
        lambda: tuple(range(1, draw.choice((3, 1000)))),
    ]
    if depth:
        kinds += [
            lambda: tuple(value(draw, depth - 1) for _ in range(draw.randint(0, 3))),
            lambda: [value(draw, depth - 1)],
            lambda: {
                draw.choice(("rows", "pages", "", text(draw), 3)): value(draw, depth - 1)
                for _ in range(draw.randint(0, 2))
            },
        ]
    return draw.choice(kinds)()


def mutated(data: bytes, draw: random.Random, changes: int = 4) -> bytes:
    """The content of a file, of which some bytes are flipped, cut out, doubled or overwritten."""
    out = bytearray(data)
    for _ in range(draw.randint(1, changes)):
        at, size = draw.randrange(len(out) + 1), draw.choice((1, 1, 2, 8, 64))
        match draw.randrange(5):
            case 0 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = out[at : at + size]
            case 3:
                out[at : at + size] = draw.randbytes(size)
            case _:
                del out[at:]
    return bytes(out)


class TooSlow(BaseException):
    """An answer took longer than a second."""


@contextlib.contextmanager
def within_a_second() -> Iterator[None]:
    """Stop what takes the processor for longer than a second, or lets the process grow much."""

    def stop(*_: object) -> None:
        raise TooSlow

    before, began = signal.signal(signal.SIGVTALRM, stop), time.thread_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The timer counts all threads of the process, and is there to end what would never end.
    signal.setitimer(signal.ITIMER_VIRTUAL, 3 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * unit
    assert time.thread_time() - began < SECONDS, "too slow"
    assert grown < MOST_MEMORY, f"grew by {grown} bytes"


def answer(call: Callable[[], Any]) -> Any:
    """What a call returns, or the message of its ValueError, which is one line that names
    something."""
    with within_a_second():
        try:
            return call()
        except ValueError as error:
            check_message(str(error))
            return str(error)


def check_message(message: str) -> None:
    """A message is one line, not too long, and has a name before what is wrong."""
    assert message.strip() and len(message.splitlines()) == 1, repr(message)
    assert len(message) < MOST_CHARACTERS, f"{len(message)} characters: {message[:80]}"
    assert "=" in message or ":" in message, message
