"""Deals connections to the fronts: each to the one that has the fewest open.

The kernel could deal them: fronts that wait at one socket are woken all at once, and the first one
takes most; with a socket each (SO_REUSEPORT) it goes by a hash, and what waits at the socket of a
front that dies is lost. Here no front has more than its share, and none of those that wait is lost.
An open file passes through a socketpair with SCM_RIGHTS.
"""

import asyncio
import errno
import logging
import socket
from contextlib import suppress

_LOG = logging.getLogger("pdjax.serving")

BACKLOG = 2048
"""Connections that the system keeps until they are accepted."""
AT_ONCE = 32
"""Connections that are accepted before anything else may happen."""
AGAIN_S = 1.0
"""Seconds after which it is tried once more where there was no room for another open file."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Receiver:
    """A front, as it is dealt connections.

    Args:
      channel: our end of a socketpair.

    Attributes:
      dealt: connections that it has been given.
      ended: those of them that have ended, as far as the front has told.
    """

    def __init__(self, channel: socket.socket) -> None:
        channel.setblocking(False)
        self.channel, self.dealt, self.ended = channel, 0, 0

    @property
    def open(self) -> int:
        """Connections that have not ended."""
        return self.dealt - self.ended

    def deal(self, connection: socket.socket) -> bool:
        """Give it a connection; returns whether it was taken."""
        try:
            socket.send_fds(self.channel, [b"c"], [connection.fileno()])
        except OSError:  # it reads nothing, or has just died
            return False
        self.dealt += 1
        return True


class Dealer:
    """Accepts connections while any front is there. Belongs to the event loop in which it is made.

    Args:
      listening: a bound socket; stays open.
    """

    def __init__(self, listening: socket.socket) -> None:
        listening.listen(BACKLOG)
        listening.setblocking(False)
        self._listening, self._loop = listening, asyncio.get_running_loop()
        self._fronts: list[Receiver] = []  # the one that has waited longest is first
        self._again: asyncio.TimerHandle | None = None

    def add(self, front: Receiver) -> None:
        """Deal to one more front."""
        self._fronts.append(front)
        self._listen()

    def remove(self, front: Receiver) -> None:
        """Deal to a front no more. While there is none, connections wait in the system."""
        with suppress(ValueError):
            self._fronts.remove(front)
        if not self._fronts:
            self._loop.remove_reader(self._listening)

    def close(self) -> None:
        """Accept no more."""
        self._fronts.clear()
        self._loop.remove_reader(self._listening)
        if self._again is not None:
            self._again.cancel()

    def _listen(self) -> None:
        self._again = None
        if self._fronts:
            self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                _LOG.error("no connection can be accepted", exc_info=error)
                self._loop.remove_reader(self._listening)
                self._again = self._loop.call_later(AGAIN_S, self._listen)
                return
            with connection:  # the front has its own
                self._deal(connection)

    def _deal(self, connection: socket.socket) -> None:
        """Give it to the front with the fewest open, or to the next one that takes it. Of equals it
        is the one that has waited longest."""
        for front in sorted(self._fronts, key=lambda front: front.open):
            if front.deal(connection):
                self._fronts.remove(front)
                self._fronts.append(front)
                return


def connections_from(channel: socket.socket) -> list[socket.socket]:
    """The connections that a front has been dealt, as far as they have arrived.

    Raises:
      EOFError: no more will come.
    """
    try:
        data, files, _, _ = socket.recv_fds(channel, AT_ONCE, AT_ONCE)
    except BlockingIOError:
        return []
    except OSError as error:
        raise EOFError from error
    if not data:
        raise EOFError
    return [socket.socket(fileno=file) for file in files]
