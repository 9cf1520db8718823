"""Runs the application on uvicorn: a socket, signals, an end that lets answers finish."""

import asyncio
import socket
import ssl
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from pdjax.serving.app import make_app
from pdjax.serving.front import Front
from pdjax.serving.logs import event
from pdjax.serving.protocol import ImpatientProtocol

KEEP_ALIVE_S = 75
"""Seconds for which an idle connection stays: above the 5 to 60 s after which clients drop theirs,
so that a server never closes one on which a request is on its way."""
LEAVE_S = 5
"""Seconds that connections have to close, once no answer is under way."""


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket at the address; it refuses connections until a server runs on it.

    Raises:
      ValueError: no such address, or it is in use.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port}: must be in [0, 65536); 0 takes a free one")
    try:
        [(family, kind, proto, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host={host!r}: {error}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ValueError(f"host={host!r}, port={port}: {error}") from error
    return found


def url_of(found: socket.socket, tls: bool = False) -> str:
    """The address of a socket, as a client writes it."""
    host, port = found.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def uvicorn_config(app: Any, stall_s: float, tls: ssl.SSLContext | None) -> uvicorn.Config:
    """How uvicorn runs an application: quietly, and with bounds for slow clients.

    Args:
      app: an ASGI application.
      stall_s: seconds after which a client that takes nothing is cut off.
      tls: the certificate; None is plain HTTP.
    """
    config = uvicorn.Config(
        app,
        http=partial(ImpatientProtocol, stall_s),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LEAVE_S,
    )
    config.load()
    config.ssl = tls  # its own flags would read the files once more
    return config


class Server(uvicorn.Server):
    """Serves a front until a signal. The first one lets answers under way finish, within
    `Settings.drain_s`, while new requests get a 503; a second one ends it at once.

    Args:
      front: closed at the end.
      tls: the certificate; None is plain HTTP.
    """

    def __init__(self, front: Front, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(uvicorn_config(make_app(front), front.settings.stall_s, tls))
        self._front = front

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self._front.is_draining
        self._front.is_draining = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.ensure_future(self._drain())
        try:
            await super().serve(sockets)
        finally:
            draining.cancel()
            await self._front.close()

    async def _drain(self) -> None:
        """Once the server is to end, wait for what is under way; then end it."""
        front, loop = self._front, asyncio.get_running_loop()
        while not front.is_draining:
            await asyncio.sleep(0.05)
        event("draining", open_answers=len(front.answers), drain_s=front.settings.drain_s)
        end = loop.time() + front.settings.drain_s
        while front.requests and loop.time() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        if front.answers:
            event("drain_ended", open_answers=len(front.answers))
            front.abort_all()
            await asyncio.sleep(0.1)  # their clients are told
        self.should_exit = True
