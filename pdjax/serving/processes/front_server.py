"""Serves the connections that a front is dealt."""

import asyncio
import socket
import ssl
from collections.abc import Generator
from contextlib import contextmanager, suppress

from pdjax.serving.front import Front
from pdjax.serving.processes.dealer import connections_from
from pdjax.serving.server import Server


class FrontServer(Server):
    """A `Server` without a socket of its own. Signals are for the engines' process, which tells.

    Args:
      front, tls: as for `Server`.
      channel: brings the connections.
    """

    def __init__(self, front: Front, tls: ssl.SSLContext | None, channel: socket.socket) -> None:
        super().__init__(front, tls)
        channel.setblocking(False)
        self._channel = channel
        self._arrived = 0
        self._beginning: dict[asyncio.Task[None], asyncio.Protocol] = {}

    @property
    def ended(self) -> int:
        """How many of the connections that have arrived are closed."""
        # One that has just been made is in both.
        return self._arrived - len({*self._beginning.values(), *self.server_state.connections})

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        asyncio.get_running_loop().add_reader(self._channel, self._arrive)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().remove_reader(self._channel)
        with suppress(OSError):  # the other end has gone
            self._channel.shutdown(socket.SHUT_RD)  # connections are for other fronts from now on
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    def _arrive(self) -> None:
        try:
            connections = connections_from(self._channel)
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._channel)
            return
        self._arrived += len(connections)
        for connection in connections:
            protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )
            beginning = asyncio.ensure_future(self._begin(connection, protocol))
            self._beginning[beginning] = protocol
            beginning.add_done_callback(self._beginning.pop)

    async def _begin(self, connection: socket.socket, protocol: asyncio.Protocol) -> None:
        connection.setblocking(False)
        with suppress(OSError):  # also of TLS: the client has gone, or speaks something else
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol, connection, ssl=self.config.ssl
            )
