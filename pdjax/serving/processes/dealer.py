"""Deals connections to the fronts: each to the one that has the fewest open.

The kernel could deal them: fronts that wait at one socket are woken all at once, and the first one
takes most; with a socket each (SO_REUSEPORT) it goes by a hash, and what waits at the socket of a
front that dies is lost. Here no front has more than its share, and none of those that wait is lost.
An open file passes through a socketpair with SCM_RIGHTS. A front says at once that it holds it,
before it reads anything from it; until then this process keeps the connection, to deal it to
another front if that one ends.
"""

import asyncio
import errno
import logging
import socket
from collections import deque
from contextlib import suppress

_LOG = logging.getLogger("pdjax.serving")

BACKLOG = 2048
"""Connections that the system keeps until they are accepted."""
AT_ONCE = 32
"""Connections that are accepted before anything else may happen."""
AGAIN_S = 1.0
"""Seconds after which it is tried once more where there was no room for another open file, or no
front took a connection."""
_MOST_HEARD = 4096
"""Connections of which a front may say at once that it holds them."""
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
        self._sent: deque[socket.socket] = deque()  # those that it has not said that it holds

    @property
    def open(self) -> int:
        """Connections that have not ended."""
        return self.dealt - self.ended

    def deal(self, connection: socket.socket) -> bool:
        """Give it a connection, which is ours no more if it was taken; returns whether it was."""
        try:
            socket.send_fds(self.channel, [b"c"], [connection.fileno()])
        except OSError:  # it reads nothing, or has just died
            return False
        self.dealt += 1
        self._sent.append(connection)
        return True

    def hear(self) -> bool:
        """Close our side of what it says that it holds; returns whether it may say more."""
        try:
            said = self.channel.recv(_MOST_HEARD)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for _ in said:
            self._sent.popleft().close()
        return bool(said)

    def take_back(self) -> list[socket.socket]:
        """The connections that it has never held; only once its process has ended."""
        while self._sent and self.hear():
            pass
        left = list(self._sent)
        self._sent.clear()
        self.dealt -= len(left)
        return left

    def close(self) -> None:
        """Close the channel, and what was left in it."""
        self.channel.close()
        while self._sent:
            self._sent.popleft().close()


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
        self._heard = set[Receiver]()  # also those that are dealt nothing at present
        self._waiting: deque[socket.socket] = deque()  # accepted, and dealt to nobody
        self._again: asyncio.TimerHandle | None = None

    def add(self, front: Receiver) -> None:
        """Deal to one more front."""
        self._fronts.append(front)
        if front not in self._heard:
            self._heard.add(front)
            self._loop.add_reader(front.channel, self._hear, front)
        self._listen()

    def remove(self, front: Receiver) -> None:
        """Deal to a front no more. While there is none, connections wait in the system."""
        with suppress(ValueError):
            self._fronts.remove(front)
        if not self._fronts:
            self._loop.remove_reader(self._listening)

    def end(self, front: Receiver) -> None:
        """The same, of one whose process has ended: what it has never held is dealt to others."""
        self.remove(front)
        self._stop_hearing(front)
        self._waiting += front.take_back()
        front.close()
        self._listen()

    def close(self) -> None:
        """Accept no more."""
        self._fronts.clear()
        self._loop.remove_reader(self._listening)
        for front in list(self._heard):
            self._stop_hearing(front)
        while self._waiting:
            self._waiting.popleft().close()
        if self._again is not None:
            self._again.cancel()

    def _hear(self, front: Receiver) -> None:
        if not front.hear():
            self._loop.remove_reader(front.channel)  # it has ended, or will

    def _stop_hearing(self, front: Receiver) -> None:
        self._heard.discard(front)
        if front.channel.fileno() >= 0:
            self._loop.remove_reader(front.channel)

    def _listen(self) -> None:
        self._again = None
        while self._fronts and self._waiting:
            if not self._deal(self._waiting[0]):
                return self._pause()
            self._waiting.popleft()
        if self._fronts:
            self._loop.add_reader(self._listening, self._accept)

    def _pause(self) -> None:
        self._loop.remove_reader(self._listening)
        self._again = self._loop.call_later(AGAIN_S, self._listen)

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
                return self._pause()
            if not self._deal(connection):
                self._waiting.append(connection)
                return self._pause()

    def _deal(self, connection: socket.socket) -> bool:
        """Give it to the front with the fewest open, or to the next one that takes it; of equals to
        the one that has waited longest. Returns whether any took it."""
        for front in sorted(self._fronts, key=lambda front: front.open):
            if front.deal(connection):
                self._fronts.remove(front)
                self._fronts.append(front)
                return True
        return False


def connections_from(channel: socket.socket) -> list[socket.socket]:
    """The connections that a front has been dealt, as far as they have arrived; the dealer is told
    that they have.

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
    with suppress(OSError):  # the engines' process has gone
        channel.send(b"h" * len(files))
    return [socket.socket(fileno=file) for file in files]
