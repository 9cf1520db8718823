"""A response of server-sent events, and answers for clients that may go away.

Every client was seen to read: `data: ` with a space, a JSON object on one line, `\\n\\n`. A failure
in the middle is an event with an error, after which the connection breaks: an end that looks proper
counts as a success with load generators.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdjax.serving.errors import ApiError

ResultT = TypeVar("ResultT")

DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(separators=(",", ":")).encode  # one for all: `dumps` would make one each


class ClientGone(Exception):
    """The client has closed its connection: nobody waits for the answer."""


def data(value: Any) -> bytes:
    """An event. Only ASCII: some clients break lines at separators of Unicode."""
    return b"data: %b\n\n" % _encode(value).encode()


def typed(value: dict[str, Any]) -> bytes:
    """An event that is named by its `type`."""
    return b"event: %b\n%b" % (value["type"].encode(), data(value))


async def unless_gone(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of `work`, which is cancelled as soon as the client goes.

    Raises:
      ClientGone: it has gone.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        await _cancelled(working, listening)


class EventStream(Response):
    """A response of events. The first event is awaited before the response begins, so that
    what fails until then has a status of its own.

    Args:
      events: made by `data` or `typed`. An ApiError that it raises ends the response: before the
        first event as a response of its own, later as an event after which the connection is
        broken off.
      failure: writes that event.
      close: called at the end, also where the client goes or no event was ever asked for.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failure: Callable[[ApiError], bytes],
        close: Callable[[], None],
    ) -> None:
        super().__init__()
        self._events, self._failure, self._close = events, failure, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        listening = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({writing, listening}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            else:
                scope["state"]["notes"]["client"] = "gone"
        finally:
            await _cancelled(writing, listening)
            self._close()

    async def _write(self, send: Send) -> None:
        begun = False
        try:
            async for each in self._events:
                if not begun:
                    await send(_START)
                    begun = True
                await send({"type": "http.response.body", "body": each, "more_body": True})
        except ApiError as error:
            if not begun:
                raise
            told = self._failure(error)
            await send({"type": "http.response.body", "body": told, "more_body": True})
            return  # uvicorn breaks a response off that has no end
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel what has not ended, and wait for its clean-up."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # what concerns anyone has been raised already
