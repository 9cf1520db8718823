"""Messages between two processes of one server: pickles behind their lengths, over a socketpair.

A pickle may run code where it is read. That is safe here: both ends are this program, run by one
user, and a socketpair has no name by which anybody else could connect. What a client sends comes as
the text or numbers of a field, never as a pickle of its own.
"""

import asyncio
import logging
import pickle
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_LOG = logging.getLogger("pdjax.serving")
_LENGTH = struct.Struct("!I")
_READ = 1 << 16
"""Bytes of one read: malloc would map a buffer of more than 128 KiB anew, and unmap it."""


def _nothing() -> None:
    """Nobody wants to know."""


class Frames:
    """One end of a socketpair. `send` may be called by any thread; all else belongs to the event
    loop in which this is made.

    Args:
      connection: closed with this.
      received: called with each message of the other end.
      lost: called once when the other end has gone.
      drained: called when all that had to wait has been written.
    """

    def __init__(
        self,
        connection: socket.socket,
        received: Callable[[Any], None],
        lost: Callable[[], None],
        drained: Callable[[], None] = _nothing,
    ) -> None:
        connection.setblocking(False)
        self._connection, self._loop = connection, asyncio.get_running_loop()
        self._received, self._lost, self._drained = received, lost, drained
        self._writing = threading.Lock()
        self._unsent, self._arrived = bytearray(), bytearray()
        self._open = True
        self._loop.add_reader(connection, self._read)

    @property
    def unsent(self) -> int:
        """Bytes that the other end has not made room for."""
        return len(self._unsent)

    def send(self, message: Any) -> None:
        """Send a message. This never waits: what the system does not take is kept, and written by
        the event loop. To an end that has gone nothing is sent."""
        body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        frame = _LENGTH.pack(len(body)) + body
        with self._writing:
            if not self._open:
                return
            waits = bool(self._unsent)
            self._unsent += frame if waits else frame[self._written(frame) :]
            if waits or not self._unsent:
                return
        with suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._watch)

    def close(self) -> None:
        """Send and receive no more."""
        with self._writing:
            if not self._open:
                return
            self._open = False
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()

    def _written(self, data: bytes | bytearray) -> int:
        """How much of it the system has taken."""
        try:
            return self._connection.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # the other end has gone, as `_read` is told, too
            return len(data)

    def _watch(self) -> None:
        if self._open:
            self._loop.add_writer(self._connection, self._write)

    def _write(self) -> None:
        with self._writing:
            del self._unsent[: self._written(self._unsent)]
            if self._unsent:
                return
            self._loop.remove_writer(self._connection)
        self._drained()

    def _read(self) -> None:
        try:
            data = self._connection.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            self._lost()
            return
        self._arrived += data
        for body in self._bodies():
            try:
                self._received(pickle.loads(body))
            except Exception:
                _LOG.exception("a message between processes was not understood")

    def _bodies(self) -> list[bytes]:
        """The messages that have arrived whole."""
        found, at, arrived = [], 0, self._arrived
        while len(arrived) >= at + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(arrived, at)
            end = at + _LENGTH.size + length
            if len(arrived) < end:
                break
            found.append(bytes(arrived[at + _LENGTH.size : end]))
            at = end
        del arrived[:at]
        return found
