"""What the server's address answers while the model loads: `/health` lives, the page is there and
says so, all else has to wait.

It runs in a thread of its own: the main thread loads, so that Ctrl-C ends the loading.
"""

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import uvicorn

from pdjax.serving.errors import ApiError
from pdjax.serving.live_page import FILES
from pdjax.serving.middleware import Receive, Scope, Send
from pdjax.serving.server import uvicorn_config

RETRY_AFTER_S = 2
"""Seconds after which a client may ask once more."""
STALL_S = 10.0
"""Seconds after which a client that takes nothing is cut off."""
LAST_S = 1.0
"""Seconds that clients which have connected have for their answer, once the model is loaded."""


async def loading(scope: Scope, receive: Receive, send: Send) -> None:
    """The application: each connection has one answer, so that none is left for the server."""
    del receive
    more: Mapping[str, str]
    if scope["path"] == "/health":
        status, body, more = 200, b"ok\n", {"content-type": "text/plain; charset=utf-8"}
    elif scope["path"] in FILES:
        status, (body, more) = 200, FILES[scope["path"]]
    else:
        error = ApiError(503, "the model is loading", kind="server_error", code="loading")
        status, body = error.status, json.dumps(error.body()).encode()
        more = {"content-type": "application/json", "retry-after": str(RETRY_AFTER_S)}
    told = {**more, "content-length": str(len(body)), "connection": "close"}
    headers = [(name.encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _LoadingServer(uvicorn.Server):
    """Answers whoever has connected before it ends; uvicorn's own would hang up on them."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in self.servers:
            listener.close()
        loop = asyncio.get_running_loop()
        end = loop.time() + LAST_S
        await asyncio.sleep(0.05)  # what was accepted just now becomes a connection
        while self.server_state.connections and loop.time() < end:
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)


@contextmanager
def answering(found: socket.socket, tls: ssl.SSLContext | None = None) -> Iterator[None]:
    """Answer at a listening socket within the block; the socket stays open after it, and what
    connects between is kept for whoever listens next."""
    server = _LoadingServer(uvicorn_config(loading, STALL_S, tls))
    own = found.dup()  # its end leaves the other one open
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve([own])), name="pdjax loading", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
