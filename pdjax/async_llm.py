"""AsyncLLM: an LLM for programs that use asyncio.

    async with await AsyncLLM.create("configs/smollm2_cpu.py") as llm:
        async for chunk in llm.stream("Once upon a time", SamplingParams(max_tokens=48)):
            print(chunk.text, end="", flush=True)

The coordinator's thread drives the turns, one more thread turns text into token ids, and one
compiles guides; no request has a thread. The event loop never waits for any of them.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

from pdjax.async_stream import AsyncStream, LoopMailbox
from pdjax.config import Config
from pdjax.core.clock import Clock
from pdjax.core.ids import EngineId
from pdjax.core.outputs import RequestOutput
from pdjax.core.request import SamplingParams
from pdjax.core.roles import Role
from pdjax.core.slo import SLO
from pdjax.guide_queue import GuideQueue
from pdjax.llm import LLM
from pdjax.request_maker import Asked, ChatOptions, RequestOptions
from pdjax.session import Closed
from pdjax.text.prompts import Prompt
from pdjax.text.tokenizer import Message

ResultT = TypeVar("ResultT")


class AsyncLLM:
    """A model, served with prefill and decode on meshes of their own, in this process.

    All its methods are called from event loops, of which there may be several. To make one takes as
    long as to load the model and to compile its steps: the constructor is for programs whose event
    loop does not run yet, `create` for all others. `close` it, or use `async with`.

    Args:
      config, overrides, backend, policies, clock, progress: as for `LLM`.

    Attributes:
      llm: the LLM below it, which other threads may use at the same time.

    Raises:
      ValueError: as for `LLM`.
    """

    def __init__(
        self,
        config: str | Path | Config = "smollm2",
        overrides: Mapping[str, Any] | None = None,
        *,
        backend: str = "device",
        policies: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
        progress: bool = True,
    ) -> None:
        how: dict[str, Any] = {"backend": backend, "policies": policies, "clock": clock}
        self.llm = LLM(config, overrides, **how, progress=progress)
        self._texts = ThreadPoolExecutor(1, "pdjax prompts")
        self._guides = GuideQueue(self.llm.coordinator)
        self._mailboxes: dict[asyncio.AbstractEventLoop, LoopMailbox] = {}
        self._closed = False
        self.llm.session.after_turns.append(self._flush)
        self.llm.session.start()

    @classmethod
    async def create(
        cls,
        config: str | Path | Config = "smollm2",
        overrides: Mapping[str, Any] | None = None,
        *,
        backend: str = "device",
        policies: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
        progress: bool = True,
    ) -> "AsyncLLM":
        """Make one in a thread: the event loop goes on meanwhile. If the task that waits is
        cancelled, what has been begun is made all the same, and closed.

        Args and Raises: as for the constructor.
        """
        how: dict[str, Any] = {"backend": backend, "policies": policies, "clock": clock}
        make = partial(cls, config, overrides, **how, progress=progress)
        made = asyncio.get_running_loop().run_in_executor(None, make)
        try:
            return await asyncio.shield(made)
        except asyncio.CancelledError:
            made.add_done_callback(_close_unwanted)
            raise

    # Whole answers.

    async def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[RequestOutput]:
        """Complete prompts; as `LLM.generate`, without a bar. To cancel it aborts its requests."""
        ask = partial(self.llm.requests.of_prompts, prompts, params, options)
        return await self._answers(await self._in_thread(ask, params, patient=True))

    async def chat(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answer a conversation, or several; as `LLM.chat`, without a bar. To cancel it aborts its
        requests."""
        ask = partial(self.llm.requests.of_conversations, messages, params, options)
        return await self._answers(await self._in_thread(ask, params, patient=True))

    # An answer as it comes.

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        whole: bool = False,
        **options: Unpack[RequestOptions],
    ) -> AsyncStream:
        """Complete one prompt, piece by piece: `async for chunk in llm.stream(...)`.

        Each chunk is of one choice, `chunk.choice`; the last one has the whole answer.
        `stream = await llm.stream(...)` submits the request before the first chunk is asked for.

        Args:
          prompt, params, options: as for `LLM.generate`.
          whole: whether each choice comes as one chunk, at its end.

        Raises:
          ValueError, QueueFull, Closed: as `LLM.stream`, when the request is submitted.
        """
        ask = partial(self.llm.requests.of_prompt, prompt, params, options)
        return self._stream(lambda: self._in_thread(ask, params), whole=whole)

    def stream_chat(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream:
        """Answer one conversation, piece by piece; as `stream` for a prompt."""
        ask = partial(self.llm.requests.of_conversation, messages, params, options)
        return self._stream(lambda: self._in_thread(ask, params))

    def abort(self, request_id: str) -> None:
        """End a request wherever it is, soon; its stream's last chunk says "abort". An id that is
        not known, or no longer, is no error."""
        self.llm.session.abort_soon(request_id)

    # Engines.

    async def set_role(self, engine: str, role: Role | str | None) -> None:
        """Let an engine prefill, decode, or do both, from when it has drained; as
        `LLM.set_role`."""
        wanted, coordinator = Role.named(role), self.llm.coordinator
        change = partial(coordinator.set_role, EngineId(engine), wanted)
        await asyncio.wrap_future(self.llm.session.call_soon(change))

    # What happened.

    def report(self, slo: SLO | None = None) -> dict[str, Any]:
        """The run so far as plain values; as `LLM.report`."""
        return self.llm.report(slo)

    def write_trace(self, path: str | Path) -> None:
        """Write the run so far as Chrome trace events; as `LLM.write_trace`."""
        self.llm.write_trace(path)

    async def close(self) -> None:
        """Abort every request that has not ended, let the devices come to rest, and free their
        memory. A second call does nothing."""
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(None, self.llm.close)
        self._texts.shutdown(wait=False)
        self._guides.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # Inside.

    async def _answers(self, asked: list[Asked]) -> list[RequestOutput]:
        for request, _ in asked:
            self.llm.coordinator.check_request(request)
        streams: list[AsyncStream] = []
        try:
            for each in asked:
                streams.append(await self._stream(_already(each), whole=True, patient=True))
            return [await _answer(stream) for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def _stream(self, ask: Callable[[], Any], **how: bool) -> AsyncStream:
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            for each in list(self._mailboxes):
                if each.is_closed():
                    self._mailboxes.pop(each, None)
            # Loops of other threads may come and go meanwhile: only single calls change the dict.
            mailbox = self._mailboxes.setdefault(loop, LoopMailbox(loop))
        return AsyncStream(self.llm.session, mailbox, ask, **how)

    def _flush(self) -> None:
        for mailbox in list(self._mailboxes.values()):
            mailbox.flush()

    async def _in_thread(
        self, call: Callable[[], ResultT], params: Any, *, patient: bool = False
    ) -> ResultT:
        """Call it outside the event loop: text may be long, templates slow, and guides slower."""
        if self._closed:
            raise Closed("this LLM is closed")
        if not _are_guided(params):
            return await asyncio.get_running_loop().run_in_executor(self._texts, call)
        choices = None if patient else params.n
        return await asyncio.wrap_future(self._guides.submit(call, choices))


def _are_guided(params: Any) -> bool:
    """Whether a guide is to be compiled for what may be params, of one request or of each."""
    each = params if isinstance(params, list | tuple) else [params]
    return any(isinstance(one, SamplingParams) and one.guide is not None for one in each)


def _close_unwanted(made: "asyncio.Future[AsyncLLM]") -> None:
    """Close what nobody waits for any more, outside the event loop."""
    if not made.cancelled() and made.exception() is None:
        threading.Thread(target=made.result().llm.close, name="pdjax close").start()


def _already(asked: Asked) -> Callable[[], Any]:
    async def ask() -> Asked:
        return asked

    return ask


async def _answer(stream: AsyncStream) -> RequestOutput:
    """The whole answer, which comes with the last chunk."""
    async for chunk in stream:
        if chunk.output is not None:
            return chunk.output
    raise AssertionError("a stream ends with its answer")
