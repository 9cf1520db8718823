"""An answer in a front: the tokens come from the engines' process, the text is made here."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from pdjax.core.logprobs import PromptLogprobs, TokenLogprobs
from pdjax.core.messages import reason_of
from pdjax.core.outputs import Completion, RequestEvent, RequestOutput
from pdjax.serving.backend import Ask
from pdjax.serving.processes.messages import (
    Close,
    Ending,
    Logprobs,
    StopFound,
    logprobs_of,
)
from pdjax.text.text_stream import TextStream

_LOG = logging.getLogger("pdjax.serving")


class RemoteChoice:
    """One choice: its tokens so far, their text, and what of both has not been told.

    Args:
      text: empty yet; None where the model has no tokenizer.
      whole: whether it is told once, at its end.
      wants_logprobs: whether tokens come with log-probabilities.

    Attributes:
      token_ids: up to the end of the choice, or to where a stop string is complete.
      stop: the stop string that was found; what comes after it is dropped.
    """

    def __init__(self, text: TextStream | None, whole: bool, wants_logprobs: bool) -> None:
        self.token_ids: list[int] = []
        self.stop: str | None = None
        self._text, self._whole = text, whole
        self._logprobs: list[TokenLogprobs] | None = [] if wants_logprobs else None
        self._told = 0
        self._ending: Ending | None = None

    def add(self, token_ids: list[int], logprobs: Logprobs | None, ending: Ending | None) -> bool:
        """Take further tokens, and the end. Returns whether they complete a stop string."""
        found = False
        if self.stop is None:
            # A token that ends the output is none of its text.
            ends = ending is not None and ending[0] == "stop" and isinstance(ending[1], int)
            found = self._push(token_ids, len(token_ids) - ends)
            if self._logprobs is not None and logprobs is not None:
                new = len(self.token_ids) - len(self._logprobs)
                self._logprobs += logprobs_of(logprobs[:new])
        if ending is not None:
            self._ending = ending if self.stop is None else ("stop", self.stop, None, ending[3])
            if self._text is not None:
                self._text.finish()
        return found

    def fail(self, error: Exception) -> None:
        """End it: its text can't be made."""
        self._ending = ("error", None, reason_of(error), None)
        self._text = None

    @property
    def may_be_told(self) -> bool:
        """Whether what is new may be told now. What ends with a stop string waits for the engines'
        word of the end."""
        return self._ending is not None or not (self._whole or self.stop is not None)

    def event(self, number: int, output: RequestOutput | None) -> RequestEvent:
        """What has not been told."""
        told, self._told = self._told, len(self.token_ids)
        finish_reason, stop_reason, error, _ = self._ending or (None, None, None, None)
        return RequestEvent(
            text="" if self._text is None else self._text.take(),
            token_ids=self.token_ids[told:],
            finish_reason=finish_reason,
            output=output,
            choice=number,
            logprobs=None if self._logprobs is None else self._logprobs[told:],
            stop_reason=stop_reason,
            error=error,
        )

    def completion(self, metrics: Any) -> Completion:
        """The whole of it, once it has ended."""
        finish_reason, stop_reason, error, _ = self._ending or ("abort", None, None, None)
        if metrics is not None and self.stop is not None:
            times = metrics.token_times[: len(self.token_ids)]
            metrics = replace(metrics, token_times=times, finish_reason=finish_reason)
        text = "" if self._text is None else self._text.text
        ids = self.token_ids
        return Completion(ids, text, finish_reason, stop_reason, self._logprobs, error, metrics)

    def _push(self, token_ids: list[int], of_text: int) -> bool:
        """Keep tokens, the first `of_text` of which have text, up to the end of a stop string."""
        text = self._text
        if text is not None:
            for place in range(of_text):
                self.stop = text.push(token_ids[place])
                if self.stop is not None:
                    self.token_ids += token_ids[: place + 1]
                    return True
        self.token_ids += token_ids
        return False


class RemoteAnswer:
    """See `Answer` in pdjax/serving/backend.py. Belongs to the event loop.

    Args:
      number: of the answer, in messages.
      ask: what it answers.
      texts: an empty text for each choice.
      send: sends a message to the engines' process.

    Attributes:
      accepted: done once the request is queued; its exception says why it is not.
      outcome: as in `Answer`.
      prompt_logprobs: told with the first event of each choice.
    """

    def __init__(
        self, number: int, ask: Ask, texts: Seq[TextStream | None], send: Callable[[Any], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = loop.create_future()
        self.outcome: asyncio.Future[RequestOutput] = loop.create_future()
        self.prompt_logprobs: PromptLogprobs | None = None
        self._told: set[int] = set()  # choices
        self._number, self._ask, self._send = number, ask, send
        wants_logprobs = ask.params.logprobs is not None
        self._choices = [RemoteChoice(text, ask.whole, wants_logprobs) for text in texts]
        self._fresh: dict[int, None] = {}  # choices with news; the one with the newest is last
        self._news = asyncio.Event()
        self._open = True

    def __aiter__(self) -> AsyncIterator[RequestEvent]:
        return self

    async def __anext__(self) -> RequestEvent:
        try:
            while self._open:
                if self._fresh:
                    return self._next_event()
                self._news.clear()
                await self._news.wait()
        except BaseException:
            self.close()
            raise
        raise StopAsyncIteration

    def close(self) -> None:
        """Read no further; a request that has not ended is aborted."""
        if self._open:
            self._open = False
            self._news.set()
            if not self.outcome.done():
                self._send(Close(self._number))

    def accept(self, error: Exception | None = None) -> None:
        """The request is queued, or refused."""
        if not self.accepted.done():
            if error is None:
                self.accepted.set_result(None)
            else:
                self.accepted.set_exception(error)

    def take(
        self, choice: int, token_ids: list[int], logprobs: Logprobs | None, ending: Ending | None
    ) -> None:
        """What is new of a choice; see `Piece`."""
        self.accept()  # news may overtake the word of it
        state = self._choices[choice]
        try:
            if state.add(token_ids, logprobs, ending) and ending is None:
                found = StopFound(self._number, choice, len(state.token_ids), str(state.stop))
                self._send(found)
        except Exception as error:
            _LOG.exception("a text could not be made")
            state.fail(error)
        if ending is not None and ending[3] is not None:
            self.outcome.set_result(self._output(ending[3]))
        if self._open and state.may_be_told:
            self._fresh.pop(choice, None)
            self._fresh[choice] = None
            self._news.set()

    def _next_event(self) -> RequestEvent:
        """What is new of one choice; the last event has the answer. A slow reader gets what has
        come meanwhile in one."""
        choice = next(iter(self._fresh))
        del self._fresh[choice]
        output = self.outcome.result() if self.outcome.done() and not self._fresh else None
        self._open = output is None
        event = self._choices[choice].event(choice, output)
        if self.prompt_logprobs is not None and choice not in self._told:
            event = replace(event, prompt_logprobs=self.prompt_logprobs)
        self._told.add(choice)
        return event

    def _output(self, metrics: list[Any]) -> RequestOutput:
        choices = [state.completion(its) for state, its in zip(self._choices, metrics, strict=True)]
        prompt = list(self._ask.prompt_token_ids)
        return RequestOutput("", None, prompt, choices, self.prompt_logprobs)
