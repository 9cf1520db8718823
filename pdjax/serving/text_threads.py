"""Threads beside the event loop that turn texts into token ids and back."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")

BRIEF = 1 << 10
"""Characters, tokens or messages below which a text takes less than a millisecond to cut. It is cut
at once: to wake a thread, and to be woken by it, would take as long."""
LONG = 1 << 16
"""Characters, tokens or messages from which on a text is long: it takes some hundredths of a second
or more to cut."""


class TextThreads:
    """One thread for short texts and one for long ones, so that a short text waits for short ones
    alone. Brief ones wait for no thread."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, "pdjax texts")
        self._long = ThreadPoolExecutor(1, "pdjax long texts")

    async def call(self, call: Callable[..., ResultT], *args: Any, **how: Any) -> ResultT:
        """Call it in one of the threads, or at once, by the size of its arguments."""
        size = _size((*args, how))
        if size < BRIEF:
            return call(*args, **how)
        thread = self._long if size >= LONG else self._short
        return await _run(thread, call, *args, **how)

    async def call_long(self, call: Callable[..., ResultT], *args: Any, **how: Any) -> ResultT:
        """Call it where long texts are made, whatever its arguments are."""
        return await _run(self._long, call, *args, **how)

    def close(self) -> None:
        """Take no further calls."""
        self._short.shutdown(wait=False)
        self._long.shutdown(wait=False)


async def _run(
    thread: ThreadPoolExecutor, call: Callable[..., ResultT], *args: Any, **how: Any
) -> ResultT:
    return await asyncio.get_running_loop().run_in_executor(thread, partial(call, *args, **how))


def _size(value: Any) -> int:
    """Characters and items in it, as far as they make it long. Token ids are counted without a
    look at each: that would take longer than what is done with them."""
    size, waiting = 0, [value]
    while waiting and size < LONG:
        each = waiting.pop()
        if isinstance(each, str):
            size += len(each)
        elif isinstance(each, list | tuple | Mapping):
            size += len(each)
            if size < LONG and not {*map(type, each)} <= {int}:
                waiting += each.values() if isinstance(each, Mapping) else each
    return size
