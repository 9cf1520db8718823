"""A backend without engines: it answers every prompt with a text that a test chooses, a byte a
token; and a server over it in a thread, at a port of its own."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pdjax.core.clock import WallClock
from pdjax.core.logprobs import PromptLogprobs, TokenLogprobs
from pdjax.core.outputs import Completion, RequestEvent, RequestOutput
from pdjax.core.request import QueueFull, Request
from pdjax.host.handoff.accounting import TransferTotals
from pdjax.host.kv.prefix_account import PrefixTotals
from pdjax.host.metrics.recent import recent
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import RequestMetrics
from pdjax.host.metrics.work import DutyTotals
from pdjax.host.sequences.limits import Limits
from pdjax.host.sequences.sequence import Sequence
from pdjax.serving.backend import Ask, Backend, ServedModel
from pdjax.serving.front import Front, Settings
from pdjax.serving.server import Server, listening_socket, url_of
from pdjax.stream import Backlog, Unread
from pdjax.text.text_stream import TextStream
from pdjax.text.tokenizer import Tokenizer
from tests.helpers.tiny_tokenizer import write_directory

PATIENCE = 20.0
TEXT = "Grüße, 世界! How are you?"
LENGTH = len(TEXT.encode())
CONTEXT = 4096
TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }} {% endfor %}]{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class FakeAnswer:
    """The events of one ask, made by a task of the event loop."""

    def __init__(self, backend: "FakeBackend", ask: Ask) -> None:
        self._backend, self.ask = backend, ask
        self.unread, self._news = Unread(), asyncio.Event()
        self._backlog = Backlog(self.unread.popleft)
        self.closed = self._ended = False
        self._told: set[int] = set()
        self.outcome: asyncio.Future[RequestOutput] = asyncio.get_running_loop().create_future()
        self._choices: list[Completion] = []
        self._completed: Callable[..., Completion] | None = None
        self._task = asyncio.ensure_future(self._make())

    def __aiter__(self) -> "FakeAnswer":
        return self

    async def __anext__(self) -> RequestEvent:
        while not (self.closed or self._ended):
            event = self._backlog.pop()
            if event is not None:
                self._ended = event.output is not None
                return event
            self._news.clear()
            await self._news.wait()
        raise StopAsyncIteration

    def close(self) -> None:
        self.closed = True
        self._task.cancel()
        self._news.set()
        if not self.outcome.done():
            begun = [] if self._completed is None else [self._completed("abort")]
            self.outcome.set_result(self._output([*self._choices, *begun]))

    async def _make(self) -> None:
        loop, backend, ask = asyncio.get_running_loop(), self._backend, self.ask
        arrival = loop.time()
        for choice in range(ask.params.n):
            decoder = backend.bytes.incremental_decoder(shown=ask.params.shown_tokens)
            texts = TextStream(decoder, ask.params.stop)
            ids, times = list[int](), list[float]()
            logprobs: list[TokenLogprobs] | None = None if ask.params.logprobs is None else []
            reason, stop, error = None, None, None
            reply, life = backend.reply(choice), backend.life(ask, choice)
            if backend.sheds is not None:
                reply, reason, error = [], "shed", backend.sheds
                new = None
            self._completed = partial(self._completion, arrival, ids, texts, times, logprobs)
            for token in reply:
                await asyncio.sleep(backend.token_s)
                stop = texts.push(token)
                ids.append(token)
                times.append(loop.time())
                backend.recorder.token(life, backend.recorder.now())
                new = _logprobs(token, ask.params.logprobs)
                if logprobs is not None:
                    logprobs.extend(new or ())
                if len(ids) == backend.fails_after:
                    reason, error = "error", "OSError: /root/secret: no such file"
                elif stop is not None:
                    reason = "stop"
                elif len(ids) == ask.params.max_tokens:
                    reason = "length"
                elif len(ids) == len(reply):
                    reason = "stop"
                if reason:
                    texts.finish()
                    break
                if not ask.whole:
                    self._tell(RequestEvent(texts.take(), [token], choice=choice, logprobs=new))
            life.finish_reason = reason
            backend.recorder.mark(life, "finished")
            self._choices.append(self._completed(reason, stop, error))
            is_last = choice == ask.params.n - 1
            last = RequestEvent(
                texts.text if ask.whole else texts.take(),
                ids if ask.whole else ids[-1:],
                reason,
                self._output(self._choices) if is_last else None,
                choice=choice,
                logprobs=logprobs if ask.whole else new,
                stop_reason=stop,
                error=error,
            )
            self._tell(last)

    def _completion(
        self,
        arrival: float,
        ids: list[int],
        texts: TextStream,
        times: list[float],
        logprobs: list[TokenLogprobs] | None,
        reason: str | None,
        stop: str | None = None,
        error: str | None = None,
    ) -> Completion:
        now = asyncio.get_running_loop().time()
        marks = (("arrived", arrival), ("prefill_started", arrival), ("finished", now))
        lengths = len(self.ask.prompt_token_ids), 2
        metrics = RequestMetrics("s", arrival, marks, times, *lengths, TransferTotals(), reason)
        return Completion(ids, texts.text, reason, stop, logprobs, error, metrics)

    def _output(self, choices: list[Completion]) -> RequestOutput:
        prompt = list(self.ask.prompt_token_ids)
        scores = _prompt_logprobs(prompt, self.ask.params.prompt_logprobs)
        return RequestOutput("r", None, prompt, [*choices], scores)

    def _tell(self, event: RequestEvent) -> None:
        if event.choice not in self._told:
            self._told.add(event.choice)
            event = replace(event, prompt_logprobs=self._output([]).prompt_logprobs)
        self.unread.append(event)
        self._news.set()
        if event.output is not None:
            self.outcome.set_result(event.output)


def _logprobs(token: int, top: int | None) -> list[TokenLogprobs] | None:
    if top is None:
        return None
    likeliest = tuple((token + i, -0.5 - i) for i in range(top))
    return [TokenLogprobs(-0.5, likeliest)]


def _prompt_logprobs(prompt: list[int], top: int | None) -> PromptLogprobs | None:
    """A token is as likely as its id is small, and the likeliest ones are those after it."""
    if top is None:
        return None
    ids = np.array(prompt, np.int32)
    others = ids[1:, None] + 1 + np.arange(top, dtype=np.int32)
    values = np.full(others.shape, -0.5, np.float32) - np.arange(top, dtype=np.float32)
    return PromptLogprobs(ids, -ids[1:].astype(np.float32), ids[1:], others, values)


class FakeBackend:
    """Answers with `text`; choice c with `text` and c exclamation marks.

    Args:
      folder: for the tokenizer's files.
      text: what is answered until a test sets another.
      template: of chats.
      special: texts of control tokens.

    Attributes:
      token_s: seconds a token takes.
      fails_after: tokens after which each choice fails; 0 never.
      full: whether the queue has no room. `sheds`: why each request is shed; None lets it in.
      answers: all that were submitted.
      recorder: has their sequences.
    """

    def __init__(
        self,
        folder: Path,
        text: str = TEXT,
        template: str = TEMPLATE,
        special: tuple[str, ...] = (),
    ) -> None:
        config = {"extra_special_tokens": [*special]} if special else {}
        self.bytes = Tokenizer.open(write_directory(folder, config, template))
        self.tokenizer: Tokenizer | None = self.bytes
        self.model = ServedModel("fake", CONTEXT, CONTEXT, 64)
        vocab_size = self.bytes.vocab_size
        self._limits = Limits(vocab_size, CONTEXT, 20, self.model.max_choices, CONTEXT, CONTEXT)
        self._first_text = text
        self.reset()

    def reset(self) -> None:
        self.text = self._first_text
        self.token_s, self.fails_after, self.full = 0.0, 0, False
        self.sheds: str | None = None
        self.answers: list[FakeAnswer] = []
        self.recorder = Recorder(WallClock())

    @property
    def asked(self) -> Ask:
        """What was asked last."""
        return self.answers[-1].ask

    @property
    def prompt(self) -> str:
        """The text of the last prompt."""
        return self.bytes.decode(self.asked.prompt_token_ids, skip_special_tokens=False)

    def reply(self, choice: int) -> list[int]:
        return self.bytes.encode(self.text + "!" * choice)

    def life(self, ask: Ask, choice: int) -> Sequence:
        """A sequence that is recorded as prefilled at once."""
        now, name = self.recorder.now(), f"r{len(self.answers)}"
        life = Sequence(Request(name, ask.prompt_token_ids, ask.params, now), choice, seed=0)
        for mark in ("arrived", "prefill_started", "first_token", "prefilled", "first_tick"):
            self.recorder.mark(life, mark)
        return life

    async def submit(self, ask: Ask) -> FakeAnswer:
        if self.full:
            raise QueueFull("9 sequences wait already")
        self._limits.check(Request("r", ask.prompt_token_ids, ask.params, 0.0))
        self.answers.append(FakeAnswer(self, ask))
        return self.answers[-1]

    async def report(self) -> dict[str, Any]:
        engine = {"rows": 4, "free_rows": 3, "prefilling": 0, "decoding": 1, "steps_in_flight": 1}
        work = {"steps": 7, "busy_seconds": 0.5, "losses": 0, "in_service": 1}
        work |= DutyTotals(role_changes=2, draining_s=0.25).to_json()
        pool: dict[str, Any] = {"pages": 8, "free_pages": 6, "cached_pages": 1, "used_pages": 2}
        pool |= {"page_size": 4, "leaving_pages": 0, **PrefixTotals().to_json()}
        pool |= {"pinned_pages": 1, "pins": 1, "pins_made": 2, "pins_refused": 3}
        return {
            "engines": {"decode/0": engine | work},
            "pools": {"hbm/decode/0": pool},
            "queue": {"waiting": 2, "running": 1, "max_waiting": 9},
            "tokens": {"prompt": 12, "output": self.recorder.output_tokens},
            "links": {"hbm/0->hbm/1": {"bytes": 64, "shipments": 1, "wire_s": 0.25}},
            "transfers": TransferTotals().to_json(),
            "prefills": {"local": 1, "remote": 2},
        }

    async def recent(self) -> list[dict[str, Any]]:
        return recent(self.recorder)

    async def close(self) -> None:
        for answer in self.answers:
            answer.close()


class Served:
    """A server in a thread.

    Attributes:
      url: of its root.
      front, server: belong to the thread's event loop, `loop`.
    """

    url: str
    front: Front
    server: Server
    loop: asyncio.AbstractEventLoop

    def until(self, condition: Any) -> None:
        """Wait until a condition of the event loop's state holds."""

        async def wait() -> None:
            while not condition():
                await asyncio.sleep(0.005)

        asyncio.run_coroutine_threadsafe(wait(), self.loop).result(PATIENCE)

    def tell_to_end(self) -> None:
        """What a signal does."""
        self.loop.call_soon_threadsafe(self.server.handle_exit, 15, None)


@contextmanager
def served(
    make: Any,
    settings: Settings | None = None,
    sends: int = 0,
    tls: ssl.SSLContext | None = None,
) -> Iterator[Served]:
    """Serve the backend that `make` makes, within the server's event loop; the system keeps `sends`
    bytes for a client, 0 as many as it likes."""
    found, running, at = listening_socket("127.0.0.1", 0), threading.Event(), Served()
    if sends:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sends)
    at.url = url_of(found, tls is not None)

    async def run() -> None:
        backend: Backend = make()
        at.loop, at.front = asyncio.get_running_loop(), Front(backend, settings or Settings())
        at.server = Server(at.front, tls)
        serving = asyncio.ensure_future(at.server.serve([found]))
        while not (at.server.started or serving.done()):
            await asyncio.sleep(0.005)
        running.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert running.wait(PATIENCE)
    try:
        yield at
    finally:
        if thread.is_alive():
            at.tell_to_end()
            at.tell_to_end()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not end"
