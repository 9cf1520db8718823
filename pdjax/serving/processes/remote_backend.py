"""The backend of a front: the engines are in another process."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from pdjax.request_maker import new_text
from pdjax.serving.backend import Ask, ServedModel
from pdjax.serving.processes.messages import (
    Accepted,
    Asked,
    News,
    Piece,
    PromptScored,
    Question,
    Refused,
    Told,
)
from pdjax.serving.processes.portions import Portions
from pdjax.serving.processes.remote_answer import RemoteAnswer
from pdjax.session import Closed
from pdjax.text.text_stream import TextStream
from pdjax.text.tokenizer import Tokenizer


class RemoteBackend:
    """See `Backend` in pdjax/serving/backend.py.

    Args:
      model: what is served.
      tokenizer: of the model, opened in this process.
      send: sends a message to the engines' process.
    """

    def __init__(
        self, model: ServedModel, tokenizer: Tokenizer | None, send: Callable[[Any], None]
    ) -> None:
        self.model, self.tokenizer, self._send = model, tokenizer, send
        self._answers: dict[int, RemoteAnswer] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._portions = Portions(self._deliver)
        self._is_lost = False

    async def submit(self, ask: Ask) -> RemoteAnswer:
        if self._is_lost:
            raise Closed("the engines' process has gone")
        number = next(self._numbers)
        self._send(Asked(number, ask))  # before its texts are made: the engines begin meanwhile
        texts = [self._new_text(ask) for _ in range(ask.params.n)]
        answer = self._answers[number] = RemoteAnswer(number, ask, texts, self._send)
        try:
            await answer.accepted
        except BaseException:
            answer.close()
            raise
        return answer

    async def report(self) -> dict[str, Any]:
        return await self._ask("report")

    async def recent(self) -> list[dict[str, Any]]:
        return await self._ask("recent")

    async def close(self) -> None:
        for answer in list(self._answers.values()):
            answer.close()

    def received(self, message: Any) -> None:
        """A message of the engines' process."""
        match message:
            case News():
                for piece in message.pieces:
                    self._portions.take(piece)
            case PromptScored():
                if message.number in self._answers:
                    self._answers[message.number].prompt_logprobs = message.logprobs
            case Accepted():
                if message.number in self._answers:
                    self._answers[message.number].accept()
            case Refused():
                self._answers.pop(message.number).accept(message.error())
            case Told():
                self._told(message)
            case _:
                raise TypeError(f"{type(message).__name__}: is no message of the engines")

    def lost(self) -> None:
        """The engines' process has gone: nothing is answered any more."""
        self._is_lost = True
        for answer in list(self._answers.values()):
            answer.accept(Closed("the engines' process has gone"))
            answer.close()
        for waiting in self._questions.values():
            waiting.cancel()

    def _deliver(self, piece: Piece) -> None:
        number, choice, token_ids, logprobs, ending = piece
        answer = self._answers.get(number)
        if answer is not None:
            answer.take(choice, token_ids, logprobs, ending)
            if answer.outcome.done():
                del self._answers[number]

    def _new_text(self, ask: Ask) -> TextStream | None:
        if self.tokenizer is None:
            return None
        return new_text(self.tokenizer, ask.prompt_token_ids, ask.params)

    async def _ask(self, method: str) -> Any:
        ticket = next(self._numbers)
        waiting = self._questions[ticket] = asyncio.get_running_loop().create_future()
        self._send(Question(ticket, method))
        try:
            return await waiting
        finally:
            del self._questions[ticket]

    def _told(self, told: Told) -> None:
        waiting = self._questions.get(told.ticket)
        if waiting is not None and not waiting.done():
            if told.error is None:
                waiting.set_result(told.value)
            else:
                waiting.set_exception(RuntimeError(f"the engines' process: {told.error}"))
