"""uvicorn's protocol of HTTP, with bounds for slow clients. Requests are read by httptools, in C,
where that is installed; else by h11, which takes 0.3 ms more of a first token. What h11 alone
refuses, `check_head` refuses for both."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from pdjax.serving.errors import ApiError

HEAD_S = 30.0
"""Seconds for the head of a request."""
MAX_HEAD = 1 << 16
"""Bytes of a head that has not come whole, after which a client is cut off."""

_UVICORNS: Any = AutoHTTPProtocol


class ImpatientProtocol(_UVICORNS):
    """Cuts a client off which takes nothing for so many seconds, or does not finish the head of a
    request within `HEAD_S` and `MAX_HEAD`.

    Args:
      stall_s: seconds.
      how: as for uvicorn's own.
    """

    def __init__(self, stall_s: float, **how: Any) -> None:
        super().__init__(**how)
        self._stall_s = stall_s
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._is_in_head, self._head = False, 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect("head", HEAD_S)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._done("head")
        elif "head" not in self._timers:
            self._expect("head", HEAD_S)
        self._head = self._head + len(data) if self._is_in_head else 0
        if self._head > MAX_HEAD:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """Called by httptools alone: h11 has a bound of its own."""
        self._is_in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called by httptools alone."""
        self._is_in_head = False
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect("write", self._stall_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._done("write")

    def connection_lost(self, exc: Exception | None) -> None:
        for what in list(self._timers):
            self._done(what)
        super().connection_lost(exc)
        # After a reset uvicorn leaves it, and with it the last request and its answer.
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()

    def _expect(self, what: str, within: float) -> None:
        self._timers[what] = self.loop.call_later(within, self.transport.abort)

    def _done(self, what: str) -> None:
        timer = self._timers.pop(what, None)
        if timer is not None:
            timer.cancel()


def check_head(scope: MutableMapping[str, Any]) -> None:
    """Refuse a head that a proxy before this server may take for another one, and end its
    connection.

    Raises:
      ApiError: a 400.
    """
    hosts, codings = 0, set[bytes]()
    for name, value in scope["headers"]:
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding":
            codings.add(value.strip().lower())
    if hosts > 1 or (hosts == 0 and scope["http_version"] == "1.1"):
        message = f"{hosts} Host headers: must be one"
    elif codings - {b"chunked"}:
        message = "Transfer-Encoding: must be chunked, or left out"
    else:
        return
    raise ApiError(400, message, code="invalid_head", headers={"Connection": "close"})
