"""`/v1/completions`: prompts of text or token ids, continued."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pdjax.core.clock import unix_time
from pdjax.core.logprobs import TokenLogprobs
from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.serving.backend import Ask
from pdjax.serving.front import Front, labels_of
from pdjax.serving.generation import STREAMS, ChunkWriter, admit, respond
from pdjax.serving.logprobs import CompletionLogprobs, TokenNames
from pdjax.serving.requests import CompletionRequest


class CompletionWriter(ChunkWriter):
    """Writes what `/v1/completions` answers: choice c of prompt p has index p * n + c.

    Args:
      front: has the model's name and tokenizer.
      request_id: of HTTP.
      body: what was asked.
      asks: one a prompt.
      echoes: the text of each prompt where it is to be repeated; else "".
    """

    def __init__(
        self,
        front: Front,
        request_id: str,
        body: CompletionRequest,
        asks: Seq[Ask],
        echoes: Seq[str],
    ) -> None:
        super().__init__(body)
        self._body, self._asks, self._echoes = body, asks, echoes
        by_id = bool(body.return_tokens_as_token_ids)
        self._names = TokenNames(front.backend.tokenizer, by_id=by_id)
        self._logprobs: dict[tuple[int, int], CompletionLogprobs] = {}
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": unix_time(),
            "model": front.backend.model.name,
        }

    def answer(self, outputs: Seq[RequestOutput]) -> dict[str, Any]:
        choices = [
            self._choice(number, index, each.text, each.token_ids, each.logprobs)
            | {"finish_reason": each.finish_reason, "stop_reason": each.stop_reason}
            for number, output in enumerate(outputs)
            for index, each in enumerate(output.choices)
        ]
        return {**self._head, "choices": choices}

    def chunk(self, number: int, event: RequestEvent) -> dict[str, Any]:
        choice = self._choice(number, event.choice, event.text, event.token_ids, event.logprobs)
        choice |= {"finish_reason": event.finish_reason, "stop_reason": event.stop_reason}
        return {**self._head, "choices": [choice]}

    def last(self) -> dict[str, Any]:
        return {**self._head, "choices": []}

    def _choice(
        self,
        number: int,
        index: int,
        text: str,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None,
    ) -> dict[str, Any]:
        """What is new of a choice; the first time, with what goes before."""
        key = (number, index)
        first = key not in self._logprobs
        if first:
            self._logprobs[key] = CompletionLogprobs(self._names, len(self._echoes[number]))
        written = None if logprobs is None else self._logprobs[key].of(token_ids, logprobs)
        ids: Mapping[str, Any] = {}
        if self._body.return_token_ids:
            prompt = list(self._asks[number].prompt_token_ids) if first else None
            ids = {"token_ids": token_ids, "prompt_token_ids": prompt}
        return {
            "index": number * (self._body.n or 1) + index,
            "text": (self._echoes[number] if first else "") + text,
            "logprobs": written,
            **ids,
        }


def routes(front: Front) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", responses=STREAMS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a prompt, or several."""
        admit(front, request, body)
        params = body.params()
        prompts = body.prompts(front.backend.model.max_choices // params.n)
        ids = await front.in_thread(_encoded, front, prompts)
        echoes = [""] * len(prompts)
        if body.echo:
            echoes = await front.in_thread(_decoded, front, prompts)
        state = request.scope["state"]
        labels = labels_of(state, body.user)
        asks = [Ask(tuple(each), params, not body.stream, labels) for each in ids]
        writer = CompletionWriter(front, state["request_id"], body, asks, echoes)
        return await respond(front, request, body, asks, writer)

    return router


def _encoded(front: Front, prompts: list[str | list[int]]) -> list[list[int]]:
    """The token ids of each prompt.

    Raises:
      ValueError: an empty text, or one that can't be cut.
    """
    if "" in prompts:
        raise ValueError("prompt='': must not be empty")
    return [front.tokenizer.encode(each) if isinstance(each, str) else each for each in prompts]


def _decoded(front: Front, prompts: list[str | list[int]]) -> list[str]:
    """The text of each prompt; "" of token ids of a model without a tokenizer."""
    tokenizer = front.backend.tokenizer
    return [
        each if isinstance(each, str) else "" if tokenizer is None else tokenizer.decode(each)
        for each in prompts
    ]
