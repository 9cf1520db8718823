"""A value that takes some milliseconds to compute, and that many ask for: it is computed once for
all who come within a moment."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

ValueT = TypeVar("ValueT")

KEPT_S = 0.2
"""Seconds for which a value serves: pages ask once a second."""


class BrieflyKept(Generic[ValueT]):
    """Called, it computes the value, unless another caller does so already or has done so within
    `KEPT_S`. Belongs to one event loop.

    Args:
      compute: makes the value.
    """

    def __init__(self, compute: Callable[[], Awaitable[ValueT]]) -> None:
        self._compute = compute
        self._computing: asyncio.Task[ValueT] | None = None
        self._until = 0.0

    async def __call__(self) -> ValueT:
        loop = asyncio.get_running_loop()
        if self._computing is None or (self._computing.done() and loop.time() >= self._until):
            self._computing = loop.create_task(self._run())
        return await asyncio.shield(self._computing)  # others wait for it, too

    async def _run(self) -> ValueT:
        value = await self._compute()
        self._until = asyncio.get_running_loop().time() + KEPT_S
        return value
