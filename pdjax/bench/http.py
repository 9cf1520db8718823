"""HTTP/1.1 as the client of a benchmark needs it: POST, and a body that comes in parts, each with
its moment. It needs nothing but asyncio, so that little lies between a socket and a moment.

As clients of this field do, it sends a request on a connection that is idle, and opens one where
there is none.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_LONGEST_LINE = 1 << 20


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


class HttpError(Exception):
    """The other side does not answer as HTTP has it, or breaks off.

    Attributes:
      sent: when it was asked; None where it was not.
      answer: what had come of an answer.
    """

    sent: float | None = None
    answer: Answer | None = None


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False


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

    async def ask(self, request: bytes, until: float | None = None) -> tuple[float, Answer]:
        """Send a request, at a moment if there is one; the moment at which it was sent, and its
        answer, whole.

        Raises:
          HttpError: there is none, or no whole one.
          OSError: the server cannot be reached.
        """
        while True:
            connection = self._idle.pop() if self._idle else await self._connect()
            if until is not None:
                await _wait(until, self._now)
            sent, answer = self._now(), Answer()
            try:
                connection.writer.write(request)
                stays = await self._read(connection.reader, answer)
            except (OSError, EOFError, HttpError, ValueError) as error:
                connection.writer.close()
                # The server may close an idle connection just when a request is sent on it.
                if connection.used and not answer.status:
                    continue
                broken = HttpError(f"the answer was cut off: {str(error) or type(error).__name__}")
                broken.sent, broken.answer = sent, answer
                raise broken from error
            except BaseException:
                connection.writer.close()
                raise
            if stays:
                connection.used = True
                self._idle.append(connection)
            else:
                connection.writer.close()
            return sent, answer

    async def close(self) -> None:
        """Close all connections."""
        while self._idle:
            writer = self._idle.pop().writer
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _connect(self) -> _Connection:
        opened = asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=_LONGEST_LINE)
        return _Connection(*await opened)

    async def _read(self, reader: asyncio.StreamReader, answer: Answer) -> bool:
        """Read an answer; returns whether the connection stays."""
        status = 0
        headers = dict[str, str]()
        while status < 200:  # 1xx are followed by another
            version, _, rest = (await reader.readuntil(b"\n")).partition(b" ")
            if not version.startswith(b"HTTP/1."):
                raise HttpError("no HTTP")
            status, headers = int(rest[:3]), {}
            while line := (await reader.readuntil(b"\n")).strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
        answer.status = status
        async for part in _parts(reader, headers):
            answer.parts.append((self._now(), part))
        length = "content-length" in headers or "transfer-encoding" in headers
        return length and headers.get("connection", "").lower() != "close"


async def _parts(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The parts of a body, as they come."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\n")).partition(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        while (await reader.readuntil(b"\n")).strip():
            pass
    elif "content-length" in headers:
        left = int(headers["content-length"])
        while left:
            part = await reader.read(min(left, 1 << 16))
            if not part:
                raise HttpError("the body ended early")
            left -= len(part)
            yield part
    else:
        while part := await reader.read(1 << 16):
            yield part


_TIMER_S = 2e-3
"""How late an event loop's timer may be; so much of a wait is spent asking the clock."""


async def _wait(until: float, now: Callable[[], float]) -> None:
    left = until - now()
    if left > _TIMER_S:
        await asyncio.sleep(left - _TIMER_S)
    while now() < until:
        await asyncio.sleep(0)
