"""The engines' end of one front: takes its requests to the session, and events back."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

from pdjax.core.outputs import RequestEvent
from pdjax.core.request import Request
from pdjax.entry import Stop
from pdjax.guide_queue import GuideQueue
from pdjax.llm import LLM
from pdjax.serving.backend import Ask
from pdjax.serving.processes.frames import Frames
from pdjax.serving.processes.messages import (
    REFUSALS,
    Accepted,
    Alive,
    Asked,
    Close,
    End,
    Question,
    Ready,
    Refused,
    Setup,
    StopFound,
    Told,
)
from pdjax.serving.processes.outbox import Outbox
from pdjax.session import Closed

_LOG = logging.getLogger("pdjax.serving")

Methods = Mapping[str, Callable[[], Awaitable[Any]]]
"""What a front may ask of the backend, by name."""


class FrontLink:
    """Belongs to the event loop in which it is made, but for what the session calls.

    Args:
      connection: to the front; closed with this.
      llm: serves the requests; a thread of its session's own drives.
      methods: that the front may ask.
      setup: told to the front.
      ready: called when the front takes connections.
      alive: called with how many of its connections have ended, each `BEAT_S` from then on.
      lost: called once when the front has gone; its requests are aborted.

    Attributes:
      open: ids of the requests that have not ended, by the front's numbers.
    """

    def __init__(
        self,
        connection: socket.socket,
        llm: LLM,
        methods: Methods,
        setup: Setup,
        ready: Callable[[], None],
        alive: Callable[[int], None],
        lost: Callable[[], None],
    ) -> None:
        self.open: dict[int, str] = {}
        self._llm, self._methods = llm, methods
        self._ready, self._alive, self._lost = ready, alive, lost
        self._tasks: set[asyncio.Future[None]] = set()
        self._compiling: dict[int, Future[Request]] = {}  # requests whose guides are
        self._guides = GuideQueue(llm.coordinator)
        self._frames = Frames(connection, self._received, self.lose, self._drained)
        self._outbox: Outbox | None = Outbox(self._frames)
        self._frames.send(setup)

    def flush(self) -> None:
        """Send what has come of the answers; called after each turn."""
        outbox = self._outbox
        if outbox is not None:
            outbox.flush()

    def end(self) -> None:
        """Let the front drain and end; a second call ends it at once."""
        self._frames.send(End())

    def close(self) -> None:
        """Abort the front's requests, and let go of it."""
        self._outbox = None
        self._frames.close()
        self._guides.close()
        for request_id in list(self.open.values()):
            self._llm.session.abort_soon(request_id)

    def lose(self) -> None:
        """Take the front for gone."""
        self.close()
        self._lost()

    def _drained(self) -> None:
        self.flush()

    def _received(self, message: Any) -> None:
        match message:
            case Asked() if message.ask.params.guide is None:
                self._submit(message.number, message.ask)
            case Asked():
                self._compile(message.number, message.ask)
            case StopFound():
                request_id = self.open.get(message.number)
                if request_id is not None:
                    self._llm.session.stop_soon(Stop(request_id, *message[1:]))
            case Close():
                compiling = self._compiling.pop(message.number, None)
                if compiling is not None:
                    compiling.cancel()
                request_id = self.open.get(message.number)
                if request_id is not None:
                    self._llm.session.abort_soon(request_id)
            case Question():
                self._begin(self._answer(message))
            case Alive():
                self._alive(message.ended)
            case Ready():
                self._ready()
            case _:
                raise TypeError(f"{type(message).__name__}: is no message of a front")

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _submit(self, number: int, ask: Ask) -> None:
        with self._refusing(number):
            self._enqueue(number, ask, self._request_of(ask))

    def _compile(self, number: int, ask: Ask) -> None:
        with self._refusing(number):
            request = self._guides.submit(partial(self._request_of, ask), ask.params.n)
            self._compiling[number] = request
            self._begin(self._submit_guided(number, ask, request))

    async def _submit_guided(self, number: int, ask: Ask, compiling: Future[Request]) -> None:
        """Submit a request whose guide is compiled first, which may take a second; one that is
        closed before is not compiled."""
        with self._refusing(number):
            compiled = asyncio.wrap_future(compiling)
            await asyncio.wait([compiled])
            is_open = self._compiling.pop(number, None) is not None and self._outbox is not None
            request = None if compiled.cancelled() else compiled.result()
            if request is None or not is_open:
                raise Closed("the answer was closed before it was begun")
            self._enqueue(number, ask, request)

    def _request_of(self, ask: Ask) -> Request:
        return self._llm.requests.of_ids(ask.prompt_token_ids, ask.params, ask.options)

    def _enqueue(self, number: int, ask: Ask, request: Request) -> None:
        self.open[number] = request.id  # first: events may come at once
        # A front that looks for stop strings needs each token at once.
        whole, told = ask.whole and not ask.params.stop, partial(self._hear, number)
        self._llm.session.submit(request, on_event=told, whole=whole, makes_text=False)
        self._frames.send(Accepted(number))

    @contextmanager
    def _refusing(self, number: int) -> Iterator[None]:
        """Tell the front of a request that can't be submitted."""
        try:
            yield
        except Exception as error:
            self.open.pop(number, None)
            if not isinstance(error, REFUSALS):
                _LOG.exception("a request could not be submitted")
            self._frames.send(Refused.by(number, error))

    def _hear(self, number: int, event: RequestEvent) -> None:
        """What the session tells of a request, within a turn."""
        outbox = self._outbox
        if outbox is not None:
            outbox.add(number, event)
        if event.output is not None:
            self.open.pop(number, None)

    async def _answer(self, question: Question) -> None:
        value, error = None, None
        try:
            value = await self._methods[question.method]()
        except Exception as failure:
            _LOG.exception("a front's question could not be answered")
            error = type(failure).__name__
        self._frames.send(Told(question.ticket, value, error))
