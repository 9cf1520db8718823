"""HTTP/1.1 as the client of a benchmark needs it: POST, and a body that comes in parts, each with
its moment. It needs nothing but asyncio, so that little lies between a socket and a moment.

As clients of this field do, it sends a request on a connection that is idle, and opens one where
there is none.
"""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_LONGEST_HEAD = 1 << 16
"""Bytes of the head of a response."""


@dataclass
class Answer:
    """A response.

    Attributes:
      status: 200 and so on.
      parts: what the body came in: its moment, and its bytes.
    """

    status: int = 0
    parts: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        """The whole of it."""
        return b"".join(part for _, part in self.parts)


@dataclass
class Exchange:
    """A request and its answer, as far as they have come.

    Attributes:
      sent: when the request was sent, before a connection was opened for it; None before that.
      answer: what has come of it.
    """

    sent: float | None = None
    answer: Answer = field(default_factory=Answer)


class HttpError(Exception):
    """The other side does not answer as HTTP has it, or breaks off."""


class _Response:
    """Reads one response out of what comes over a connection.

    Args:
      answer: takes what is read.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer, self._rest = answer, b""
        self._read: Callable[[float], bool] = self._head
        self.ended = self.stays = False

    def feed(self, moment: float, data: bytes) -> None:
        """Take what has come at a moment.

        Raises:
          ValueError: it is no HTTP.
        """
        self._rest += data
        while not self.ended and self._read(moment):
            pass

    def close(self) -> bool:
        """The connection has been closed; returns whether the response is whole."""
        self.ended = self.ended or self._read == self._to_the_end
        return self.ended

    # Each reads a part of the response, and says whether it found one.

    def _head(self, moment: float) -> bool:
        head, found, rest = self._rest.partition(b"\r\n\r\n")
        if not self._rest.startswith(b"HTTP/1."[: len(self._rest)]) or len(head) > _LONGEST_HEAD:
            raise ValueError("no HTTP")
        if not found:
            return False
        first, *lines = head.split(b"\r\n")
        status = int(first.split(b" ")[1])
        self._rest = rest
        if status < 200:  # 1xx are followed by another
            return True
        pairs = (line.decode("latin-1").partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._answer.status = status
        self.stays = headers.get("connection", "").lower() != "close"
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._read = self._chunk
        elif "content-length" in headers:
            self._left, self._read = int(headers["content-length"]), self._counted
        else:
            self.stays, self._read = False, self._to_the_end
        return True

    def _chunk(self, moment: float) -> bool:
        line, found, rest = self._rest.partition(b"\r\n")
        if not found:
            return False
        size = int(line.partition(b";")[0], 16)
        if not size:
            self._rest, self._read = rest, self._trailer
            return True
        if len(rest) < size + 2:
            return False
        self._answer.parts.append((moment, rest[:size]))
        self._rest = rest[size + 2 :]
        return True

    def _trailer(self, moment: float) -> bool:
        line, found, self._rest = self._rest.partition(b"\r\n")
        if not found:
            self._rest = line
        self.ended = bool(found) and not line
        return bool(found)

    def _counted(self, moment: float) -> bool:
        part, self._rest = self._rest[: self._left], self._rest[self._left :]
        self._left -= len(part)
        if part:
            self._answer.parts.append((moment, part))
        self.ended = not self._left
        return False

    def _to_the_end(self, moment: float) -> bool:
        if self._rest:
            self._answer.parts.append((moment, self._rest))
        self._rest = b""
        return False


class _Connection(asyncio.Protocol):
    """A connection, on which one response after another comes.

    Args:
      now: tells the time of what comes.
      idle: has the connections on which nothing is under way.
    """

    def __init__(self, now: Callable[[], float], idle: list["_Connection"]) -> None:
        self._now, self._idle = now, idle
        self._response: _Response | None = None
        self._whole: asyncio.Future[None] | None = None
        self.used = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def ask(self, request: bytes, answer: Answer) -> None:
        """Send a request, and read its answer.

        Raises:
          OSError, ValueError: it breaks off, or is no HTTP.
        """
        if self._transport.is_closing():
            raise ConnectionError("the connection was closed")
        self._response = response = _Response(answer)
        self._whole = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(request)
            await self._whole
        except BaseException:
            self._transport.close()
            raise
        self.used = True
        if response.stays and not self._transport.is_closing():
            self._idle.append(self)
        else:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        now, whole, response = self._now(), self._whole, self._response
        if whole is None or response is None or whole.done():
            self._transport.close()  # nobody has asked
            return
        try:
            response.feed(now, data)
        except (ValueError, LookupError) as error:
            whole.set_exception(ValueError(f"no HTTP: {error}"))
        else:
            if response.ended:
                whole.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._idle:
            self._idle.remove(self)
        if self._whole is None or self._response is None or self._whole.done():
            return
        if self._response.close():
            self._whole.set_result(None)
        else:
            self._whole.set_exception(exc or ConnectionError("the connection was closed"))

    def close(self) -> None:
        self._transport.close()


class HttpClient:
    """Connections to one server.

    Args:
      url: http://host:port, or https; a path goes before those of requests.
      now: tells the time of parts.
      headers: of every request.

    Raises:
      ValueError: no such URL.
    """

    def __init__(
        self, url: str, now: Callable[[], float], headers: dict[str, str] | None = None
    ) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError(f"url={url!r}: must be as http://127.0.0.1:8000")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname
        self._port = port or (443 if self._tls else 80)
        self._path, self._now = parts.path.rstrip("/"), now
        more = {"host": parts.netloc.rpartition("@")[2], **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in more.items())
        self._idle: list[_Connection] = []

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A request as it goes over the wire, to be sent when it is due."""
        content = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}{content if body else ''}\r\n"
        return head.encode("latin-1") + body

    async def ask(
        self, request: bytes, exchange: Exchange | None = None, until: float | None = None
    ) -> Exchange:
        """Send a request, and read its answer, whole.

        Args:
          exchange: is filled as the request goes and its answer comes, so that its owner has both
            when an error or a cancellation ends this; None makes one.
          until: the moment at which the request is sent; None sends it now.

        Raises:
          HttpError: there is none, or no whole one.
          OSError: the server cannot be reached.
        """
        if until is not None:
            await _wait(until, self._now)
        exchange = Exchange() if exchange is None else exchange
        exchange.sent = self._now()
        while True:
            connection = self._idle.pop() if self._idle else await self._connect()
            exchange.answer = answer = Answer()
            try:
                await connection.ask(request, answer)
                return exchange
            except (OSError, ValueError) as error:
                # The server may close an idle connection just when a request is sent on it.
                if connection.used and not answer.status:
                    continue
                told = str(error) or type(error).__name__
                raise HttpError(f"the answer was cut off: {told}") from error

    async def close(self) -> None:
        """Close all connections."""
        while self._idle:
            self._idle.pop().close()
        await asyncio.sleep(0)  # transports close in the next turn of the event loop

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self._now, self._idle), self._host, self._port, ssl=self._tls
        )
        return connection


_TIMER_S = 2e-3
"""How late an event loop's timer may be; so much of a wait is spent asking the clock."""


async def _wait(until: float, now: Callable[[], float]) -> None:
    left = until - now()
    if left > _TIMER_S:
        await asyncio.sleep(left - _TIMER_S)
    while now() < until:
        await asyncio.sleep(0)
