"""`/v1/completions`: prompts of text or token ids, continued."""

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pdjax.core.clock import unix_time
from pdjax.core.logprobs import PromptLogprobs
from pdjax.core.outputs import Completion, RequestEvent, RequestOutput
from pdjax.serving.backend import Ask
from pdjax.serving.errors import bad_value
from pdjax.serving.front import Front, labels_of
from pdjax.serving.generation import ChunkWriter, admit, respond
from pdjax.serving.logprobs import CompletionLogprobs, TokenNames, offsets_of, prompt_logprobs
from pdjax.serving.openapi.answers import Completion as CompletionAnswer
from pdjax.serving.openapi.answers import CompletionChunk
from pdjax.serving.openapi.document import answers, chunks
from pdjax.serving.requests import CompletionRequest
from pdjax.text.tokenizer import Tokenizer


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
        self._tokenizer = front.backend.tokenizer
        self._names = TokenNames(self._tokenizer, by_id=bool(body.return_tokens_as_token_ids))
        self._logprobs: dict[tuple[int, int], CompletionLogprobs] = {}
        self._head = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": unix_time(),
            "model": front.backend.model.name,
        }

    def answer(self, outputs: Seq[RequestOutput]) -> dict[str, Any]:
        choices = [
            self._choice(number, index, choice, output.prompt_logprobs)
            for number, output in enumerate(outputs)
            for index, choice in enumerate(output.choices)
        ]
        return {**self._head, "choices": choices}

    def chunk(self, number: int, event: RequestEvent) -> dict[str, Any]:
        choice = self._choice(number, event.choice, event, event.prompt_logprobs)
        return {**self._head, "choices": [choice]}

    def last(self) -> dict[str, Any]:
        return {**self._head, "choices": []}

    def _choice(
        self,
        number: int,
        index: int,
        new: Completion | RequestEvent,
        of_prompt: PromptLogprobs | None,
    ) -> dict[str, Any]:
        """What is new of a choice; the first time, with what goes before."""
        body, is_first = self._body, (number, index) not in self._logprobs
        if body.is_prompt_alone:
            new = replace(new, text="", token_ids=[], logprobs=[], stop_reason=None)
            new = replace(new, finish_reason=new.finish_reason and "length")
        written = self._written(number, index, new, of_prompt)
        more: dict[str, Any] = {}
        if body.return_token_ids:
            prompt = list(self._asks[number].prompt_token_ids) if is_first else None
            more = {"token_ids": new.token_ids, "prompt_token_ids": prompt}
        if body.prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(self._names, of_prompt, body.prompt_logprobs)
        return {
            "index": number * (body.n or 1) + index,
            "text": (self._echoes[number] if is_first else "") + new.text,
            "logprobs": written,
            "finish_reason": new.finish_reason,
            "stop_reason": new.stop_reason,
            **more,
        }

    def _written(
        self,
        number: int,
        index: int,
        new: Completion | RequestEvent,
        of_prompt: PromptLogprobs | None,
    ) -> dict[str, Any] | None:
        """The `logprobs` of what is new; the first time, with those of a repeated prompt."""
        echo, most = self._echoes[number], self._body.logprobs
        writer = self._logprobs.setdefault(
            (number, index), CompletionLogprobs(self._names, most or 0, len(echo))
        )
        if most is None:
            return None
        written = writer.of(new.token_ids, new.logprobs or [])
        if not self._body.echo or of_prompt is None:
            return written
        prompt = self._asks[number].prompt_token_ids
        before = writer.of_prompt(of_prompt, prompt, offsets_of(self._tokenizer, prompt, echo))
        return {name: values + written[name] for name, values in before.items()}


ANSWERS = answers(CompletionAnswer, stream=chunks(CompletionChunk), limited=True)


def routes(front: Front) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/completions", responses=ANSWERS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a prompt, or several."""
        admit(front, request, body)
        params = body.params()
        prompts = body.prompts(front.backend.model.max_choices // params.n)
        ids = await _encoded(front, prompts)
        echoes = [""] * len(prompts)
        if body.echo:
            echoes = await front.in_thread(_decoded, front, prompts)
        state = request.scope["state"]
        labels = labels_of(state, body.user)
        wishes = body.wishes()
        asks = [Ask(tuple(each), params, not body.stream, labels, **wishes) for each in ids]
        writer = CompletionWriter(front, state["request_id"], body, asks, echoes)
        return await respond(front, request, body, asks, writer)

    return router


async def _encoded(front: Front, prompts: list[str | list[int]]) -> list[list[int]]:
    """The token ids of each prompt.

    Raises:
      ApiError: a 400: an empty text, one that can't be cut, or a model without a tokenizer.
    """
    if "" in prompts:
        front.metrics.refused("invalid")
        raise bad_value("prompt", "", "must not be empty")
    texts = [each for each in prompts if isinstance(each, str)]
    cut = iter(await front.in_thread(_all_cut, front.tokenizer, texts) if texts else ())
    return [next(cut) if isinstance(each, str) else each for each in prompts]


def _all_cut(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text) for text in texts]


def _decoded(front: Front, prompts: list[str | list[int]]) -> list[str]:
    """The text of each prompt; "" of token ids of a model without a tokenizer."""
    tokenizer = front.backend.tokenizer
    return [
        each if isinstance(each, str) else "" if tokenizer is None else tokenizer.decode(each)
        for each in prompts
    ]
