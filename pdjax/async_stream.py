"""An answer as it comes, for a program that uses asyncio: what `AsyncLLM.stream` hands out."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from types import TracebackType
from typing import Any

from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.core.request import Request
from pdjax.request_maker import Asked
from pdjax.session import Session
from pdjax.stream import Backlog, StreamChunk, Unread


class LoopMailbox:
    """Carries events from the thread that drives turns to an event loop.

    The loop is woken once for all events of a turn, and when that has ended: a loop that wakes in
    the middle of a turn would take the interpreter's lock from it.

    Args:
      loop: the event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._arrived: deque[tuple[Letters, RequestEvent]] = deque()
        self._called = False

    def post(self, letters: "Letters", event: RequestEvent) -> None:
        """Leave an event for `flush`. Any thread may."""
        self._arrived.append((letters, event))

    def flush(self) -> None:
        """Let the loop deliver what has been posted, as far as it has not been asked to."""
        if self._arrived and not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop may be closed at any moment
                self.loop.call_soon_threadsafe(self._deliver)
        if self.loop.is_closed():
            self._arrived.clear()

    def _deliver(self) -> None:
        self._called = False  # first: for an event that comes from here on `flush` asks again
        while self._arrived:
            letters, event = self._arrived.popleft()
            letters.take(event)


class Letters:
    """The events of one stream. The session knows these and not the stream, so that a stream that
    is dropped can be told from one that is read.

    Args:
      mailbox: of the loop in which the stream is read.
      session: serves the request.
    """

    def __init__(self, mailbox: LoopMailbox, session: Session) -> None:
        self.events = Unread()
        self.news = asyncio.Event()
        self.outcome: asyncio.Future[RequestOutput] = mailbox.loop.create_future()
        self._mailbox, self._session = mailbox, session

    def take(self, event: RequestEvent) -> None:
        """Keep an event that the mailbox has brought, within the loop."""
        self.events.append(event)
        self.news.set()
        if event.output is not None and not self.outcome.done():
            self.outcome.set_result(event.output)

    def hear(self, event: RequestEvent) -> None:
        """What the session tells of the request, within a turn. Where the loop has been closed, no
        reader will come: the request is ended."""
        if not self._mailbox.loop.is_closed():
            self._mailbox.post(self, event)
        elif event.output is None:
            self._session.abort_soon(event.request_id)


class AsyncStream:
    """An asynchronous iterator of StreamChunks.

    `async for chunk in stream` submits the request with the first chunk; `await stream` does so
    before, and returns the stream. The request is aborted when the task that reads is cancelled,
    and when the stream is closed or dropped. A reader may be slow: the stream keeps what has come
    meanwhile, and no request waits. Several tasks of a loop may read: each chunk goes to one.

    Args:
      session: serves the request; a thread of its own drives.
      mailbox: of the running event loop.
      ask: makes the request.
      whole: whether each choice comes as one chunk, at its end.
      patient: whether the request waits where the queue has no room, instead of being refused.

    Attributes:
      request: what was submitted; None before.
      outcome: the whole answer once the request has ended, also where the stream was closed.
    """

    def __init__(
        self,
        session: Session,
        mailbox: LoopMailbox,
        ask: Callable[[], Awaitable[Asked]],
        *,
        whole: bool = False,
        patient: bool = False,
    ) -> None:
        self.request: Request | None = None
        self._session, self._ask = session, ask
        self._whole, self._patient = whole, patient
        self._letters = Letters(mailbox, session)
        self._backlog = Backlog(self._letters.events.popleft)
        self.outcome = self._letters.outcome
        self._starting = asyncio.Lock()
        self._open = True

    @property
    def request_id(self) -> str | None:
        """The id of the request; None before it is submitted."""
        return None if self.request is None else self.request.id

    def __await__(self) -> Generator[Any, None, "AsyncStream"]:
        return self._started().__await__()

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> StreamChunk:
        if self.request is None:
            await self._started()
        news = self._letters.news
        try:
            while self._open:
                chunk = self._backlog.pop()
                if chunk is not None:
                    if chunk.output is not None:
                        self._open = False
                        news.set()  # for other readers
                    return chunk
                news.clear()
                await news.wait()
        except BaseException:
            self.close()
            raise
        raise StopAsyncIteration

    async def __aenter__(self) -> "AsyncStream":
        return await self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def aclose(self) -> None:
        """Stop listening, as one stops an asynchronous generator."""
        self.close()

    def close(self) -> None:
        """Stop listening; a request that has not ended is aborted."""
        if self._open:
            self._open = False
            self._letters.news.set()
            if self.request is not None:
                self._session.abort_soon(self.request.id)

    def __del__(self) -> None:
        # The collector may run this in any thread, also in the middle of a turn.
        if self._open and self.request is not None:
            self._session.abort_soon(self.request.id)

    async def _started(self) -> "AsyncStream":
        async with self._starting:
            if self.request is None and self._open:
                request, text = await self._ask()
                if not self._open:  # closed meanwhile
                    return self
                self._session.submit(
                    request,
                    text,
                    on_event=self._letters.hear,
                    whole=self._whole,
                    patient=self._patient,
                )
                self.request = request
        return self
