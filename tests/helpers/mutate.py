"""Hostile and careless input in place of a value, a name, a text or a file."""

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
"""Most processor time of an answer."""
MOST_MEMORY = 1 << 30
"""Most bytes by which a run of cases may grow the process."""
MOST_CHARACTERS = 2000
"""Most characters of a message."""


def cases(usual: int) -> range:
    """Return the seeds of a run: `usual` of them, or PDJAX_FUZZ_CASES."""
    return range(int(os.environ.get("PDJAX_FUZZ_CASES", usual)))


class BadRepr:
    """An object with a __repr__ that fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


def ring() -> dict[str, Any]:
    """Make a dict that holds itself."""
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
    """Draw a whole number, often at a limit."""
    return draw.choice(INTEGERS) + draw.choice((0, 0, 1, -1))


def text(draw: random.Random) -> str:
    """Draw text: meaningless, or with special meaning."""
    return draw.choice(TEXTS)


def value(draw: random.Random, depth: int = 2) -> Any:
    """Draw a Python value of any kind."""
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
    """Flip, cut out, double or overwrite some bytes of a file's content."""
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
    """Fail a block that takes more than a second of the processor, or grows the process by more
    than MOST_MEMORY."""

    def stop(*_: object) -> None:
        raise TooSlow

    before, began = signal.signal(signal.SIGVTALRM, stop), time.thread_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The timer counts all threads of the process; it only stops a block that would never end.
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
    """Return the result of a call, or the checked message of its ValueError."""
    with within_a_second():
        try:
            return call()
        except ValueError as error:
            check_message(str(error))
            return str(error)


def check_message(message: str) -> None:
    """Check that a message is one line of bounded length that begins with a name."""
    assert message.strip() and len(message.splitlines()) == 1, repr(message)
    assert len(message) < MOST_CHARACTERS, f"{len(message)} characters: {message[:80]}"
    assert "=" in message or ":" in message, message
