"""From asks to the body of a response, whole or as a stream: what all kinds of answers share."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from collections.abc import Sequence as Seq
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.host.metrics.request import RequestMetrics
from pdjax.serving import sse
from pdjax.serving.backend import Ask
from pdjax.serving.errors import ApiError, draining, failed, shed
from pdjax.serving.front import Front
from pdjax.serving.logs import event as log_event
from pdjax.serving.open_answer import OpenAnswer
from pdjax.serving.requests import ChunkedRequest, SampledRequest

SHORT = 2048
"""Log-probabilities of one response that the event loop writes: each takes some microseconds."""
SHORT_TEXT = 1 << 14
"""Tokens of one response whose text the event loop reads and writes."""

Usage = Callable[[], dict[str, Any]]
"""What has been used so far, in the form of completions and chats."""


class Writer(Protocol):
    """Writes the body of one kind of response. `number` is that of the prompt."""

    def whole(self, outputs: Seq[RequestOutput], usage: Usage) -> dict[str, Any]:
        """A whole response."""
        ...

    def events(self, number: int, event: RequestEvent, usage: Usage) -> bytes:
        """What a stream says of an event; may be nothing."""
        ...

    def end(self, usage: Usage) -> bytes:
        """What a stream says at its end."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """What a stream says where it breaks off."""
        ...


class ChunkWriter:
    """The form of completions and chats: chunks of one kind, and usage where it is asked for.

    Args:
      body: what was asked.
    """

    def __init__(self, body: ChunkedRequest) -> None:
        self._nothing: dict[str, Any] = {"usage": None} if body.has_usage else {}
        self._has_usage, self._continuous = body.has_usage, body.has_continuous_usage

    def answer(self, outputs: Seq[RequestOutput]) -> dict[str, Any]:
        """A whole response, without usage."""
        raise NotImplementedError

    def chunk(self, number: int, event: RequestEvent) -> dict[str, Any]:
        """A chunk of a stream, without usage."""
        raise NotImplementedError

    def last(self) -> dict[str, Any]:
        """The chunk that has no choices."""
        raise NotImplementedError

    def used(self, usage: Usage) -> dict[str, Any]:
        """The usage so far."""
        return usage()

    def whole(self, outputs: Seq[RequestOutput], usage: Usage) -> dict[str, Any]:
        return self.answer(outputs) | {"usage": self.used(usage)}

    def events(self, number: int, event: RequestEvent, usage: Usage) -> bytes:
        chunk = self.chunk(number, event)
        so_far = {"usage": self.used(usage)} if self._continuous else self._nothing
        return sse.data(chunk | so_far)

    def end(self, usage: Usage) -> bytes:
        if not self._has_usage:
            return sse.DONE
        return sse.data(self.last() | {"usage": self.used(usage)}) + sse.DONE

    def failure(self, error: ApiError) -> bytes:
        return sse.data(error.body())


def admit(front: Front, request: Request, body: SampledRequest) -> None:
    """Refuse what can be refused before any text is read; fields that nobody knows are noted.

    Raises:
      ApiError: a 400, 404 or 503.
    """
    front.check_model(body.model)
    front.check_open()
    unknown = body.unknown_fields()
    if unknown:
        request.scope["state"]["notes"]["ignored_fields"] = [name[:64] for name in unknown[:16]]


async def respond(
    front: Front, request: Request, body: SampledRequest, asks: Seq[Ask], writer: Writer
) -> Response:
    """Submit the asks, and answer with all of their choices.

    Raises:
      ApiError: as `Front.submit`; or a request failed on the way.
      sse.ClientGone: nobody waits any more; what was submitted is aborted.
    """
    notes: dict[str, Any] = request.scope["state"]["notes"]
    notes["prompt_tokens"] = sum(len(ask.prompt_token_ids) for ask in asks)
    answers = await front.submit(asks)
    request.scope["state"]["answers"].extend(answers)
    run = _Run(front, request.scope["state"]["request_id"], notes, answers)
    if body.stream:
        return sse.EventStream(_events(run, writer), writer.failure, run.close)
    try:
        outputs = await sse.unless_gone(request, _outputs(run))
    finally:
        run.close()
    if _is_long(outputs):
        return await front.in_long_thread(lambda: JSONResponse(writer.whole(outputs, run.usage)))
    return JSONResponse(writer.whole(outputs, run.usage))


def _is_long(outputs: Seq[RequestOutput]) -> bool:
    """Whether it takes a while to write the answers: they have much text, or log-probabilities of
    prompts, or more than `SHORT` of tokens."""
    choices = [choice for output in outputs for choice in output.choices]
    if sum(len(choice.token_ids) for choice in choices) > SHORT_TEXT:
        return True
    if any(output.prompt_logprobs is not None for output in outputs):
        return True
    return sum(1 + len(each.top) for choice in choices for each in choice.logprobs or ()) > SHORT


class _Run:
    """The answers of one HTTP request, and what is told of them."""

    def __init__(
        self,
        front: Front,
        request_id: str,
        notes: dict[str, Any],
        answers: Seq[OpenAnswer],
    ) -> None:
        self.front, self._request_id, self.notes = front, request_id, notes
        self.answers = answers
        self._page_size, self._cached = front.backend.model.page_size, 0

    def check(self, event: RequestEvent) -> None:
        """Refuse to take a choice that failed, or that the server has ended, for an answer.

        Raises:
          ApiError: a 400, 500 or 503.
        """
        if event.finish_reason == "shed":
            raise shed(event.error or "")
        if event.finish_reason in ("error", "abort"):
            if event.error is None:
                raise draining()
            log_event(
                "engine_failed", logging.ERROR, request_id=self._request_id, reason=event.error
            )
            raise failed(self._request_id)

    def ended(self, output: RequestOutput) -> None:
        """An answer is whole."""
        self.notes["finish_reason"] = ",".join(str(each.finish_reason) for each in output.choices)
        for choice in output.choices[:1]:
            if isinstance(choice.metrics, RequestMetrics):
                cached, page = choice.metrics.cached_tokens, self._page_size
                self._cached += cached // page * page
                if choice.metrics.ttft is not None:
                    self.notes["ttft_ms"] = round(choice.metrics.ttft * 1e3, 1)

    def usage(self) -> dict[str, Any]:
        """What has been used so far."""
        prompt = sum(len(answer.ask.prompt_token_ids) for answer in self.answers)
        generated = sum(answer.generated for answer in self.answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    def close(self) -> None:
        """Abort what has not ended."""
        self.notes["completion_tokens"] = sum(answer.generated for answer in self.answers)
        for answer in self.answers:
            answer.close()


async def _outputs(run: _Run) -> list[RequestOutput]:
    """The answer of each ask, in order."""
    outputs = []
    for answer in run.answers:
        output = None
        async for event in answer:
            run.check(event)
            output = event.output
        if output is None:  # closed: the server ends
            raise draining()
        run.ended(output)
        outputs.append(output)
    return outputs


async def _events(run: _Run, writer: Writer) -> AsyncGenerator[bytes, None]:
    """The events of a stream.

    Raises:
      ApiError: a request failed on the way.
    """
    missing = len(run.answers)
    try:
        async for number, event in _merged(run.answers):
            run.check(event)
            if event.output is not None:
                run.ended(event.output)
                missing -= 1
            if event.prompt_logprobs is None:
                told = writer.events(number, event, run.usage)
            else:
                told = await run.front.in_long_thread(writer.events, number, event, run.usage)
            if told:
                yield told
        if missing:
            raise draining()
        yield writer.end(run.usage)
    finally:
        run.close()


async def _merged(answers: Seq[OpenAnswer]) -> AsyncIterator[tuple[int, RequestEvent]]:
    """The events of several answers as they come, each with the number of its answer."""
    if len(answers) == 1:
        async for event in answers[0]:
            yield 0, event
        return
    reading = {asyncio.ensure_future(_next(answer)): i for i, answer in enumerate(answers)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = reading.pop(task)
                new = task.result()
                if new is not None:
                    yield number, new
                    reading[asyncio.ensure_future(_next(answers[number]))] = number
    finally:
        for task in reading:
            task.cancel()


async def _next(answer: OpenAnswer) -> RequestEvent | None:
    async for event in answer:
        return event
    return None
