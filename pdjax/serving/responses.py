"""`/v1/responses`: a text or a conversation, answered in text and calls of tools. Nothing is kept:
each request brings its whole conversation."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pdjax.core.clock import unix_time
from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.core.request import SamplingParams
from pdjax.serving import sse
from pdjax.serving.conversation_ask import conversation_ask
from pdjax.serving.errors import ApiError
from pdjax.serving.front import Front
from pdjax.serving.generation import Usage, admit, respond
from pdjax.serving.openapi.document import answers
from pdjax.serving.openapi.model_response import ModelResponse
from pdjax.serving.parsers.answer import AnswerReader
from pdjax.serving.response_items import OutputItems
from pdjax.serving.responses_body import ResponsesRequest


class ResponseWriter:
    """Writes what `/v1/responses` answers: a response with items, most often one message.

    A stream tells of the response before the first item, then of each item as it comes, and at last
    of all of them whole. What goes before the first item comes with the first text, so that a
    request that fails until then has a status of its own.

    Args:
      model: its name.
      request_id: of HTTP.
      body: what was asked.
      params: how it is answered.
      reader: of the answer.
    """

    def __init__(
        self,
        model: str,
        request_id: str,
        body: ResponsesRequest,
        params: SamplingParams,
        reader: AnswerReader,
    ) -> None:
        self._number = 0
        self._reader, self._items = reader, OutputItems(request_id, self._event)
        self._finish_reason: str | None = None
        self._head = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": unix_time(),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "temperature": params.temperature,
            "top_p": params.top_p,
            "user": body.user,
            "text": {"format": body.format or {"type": "text"}},
            "background": False,
            "store": False,
            "previous_response_id": None,
            "truncation": "disabled",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
        }

    def whole(self, outputs: Seq[RequestOutput], usage: Usage) -> dict[str, Any]:
        [output] = outputs
        [choice] = output.choices
        self._finish_reason = choice.finish_reason
        self._items.take(self._reader.whole(choice.text, choice.token_ids))
        self._items.end(self._is_cut)
        return self._ended(usage)

    def events(self, number: int, event: RequestEvent, usage: Usage) -> bytes:
        told = b"" if self._number else self._begin()
        self._finish_reason = event.finish_reason
        ended = event.finish_reason is not None
        return told + self._items.take(self._reader.push(event.text, event.token_ids, ended=ended))

    def end(self, usage: Usage) -> bytes:
        told = self._items.end(self._is_cut)
        response = self._ended(usage)
        return told + self._event(response["status"], response=response)

    def failure(self, error: ApiError) -> bytes:
        body = error.body()
        told = {key: body["error"][key] for key in ("code", "message", "param")}
        return sse.typed({"type": "error", "sequence_number": self._next(), **told, **body})

    @property
    def _is_cut(self) -> bool:
        """Whether `max_output_tokens` or the context has cut the answer."""
        return self._finish_reason == "length"

    def _begin(self) -> bytes:
        response = self._response("in_progress", [])
        created = self._event("created", response=response)
        return created + self._event("in_progress", response=response)

    def _event(self, name: str, **fields: Any) -> bytes:
        kind = {"type": f"response.{name}", "sequence_number": self._next()}
        return sse.typed(kind | fields)

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    def _response(
        self,
        status: str,
        output: list[dict[str, Any]],
        reason: str | None = None,
        usage: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": None if reason is None else {"reason": reason},
            "output": output,
            "usage": usage,
        }

    def _ended(self, usage: Usage) -> dict[str, Any]:
        """The response with all items; one that was cut is incomplete."""
        reason = "max_output_tokens" if self._is_cut else None
        status = "incomplete" if self._is_cut else "completed"
        used = _usage(usage(), self._reader.reasoning_tokens or 0)
        return self._response(status, self._items.items, reason, used)


def _usage(used: dict[str, Any], reasoning_tokens: int) -> dict[str, Any]:
    """Usage in the form of responses. Pools keep what was prefilled by themselves: nothing is
    written at a client's wish."""
    cached = used["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": used["total_tokens"],
    }


@contextmanager
def _input_named() -> Iterator[None]:
    """Call what other endpoints know as a prompt or messages `input`."""
    try:
        yield
    except ApiError as error:
        if error.param in ("prompt", "messages"):
            error.param = "input"
        raise


_EVENTS = "those of OpenAI's API, from `response.created` to `response.completed`."
ANSWERS = answers(ModelResponse, stream=_EVENTS, limited=True)


def routes(front: Front) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/responses", responses=ANSWERS)
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        """Answer a text or a conversation."""
        admit(front, request, body)
        params, messages = body.params(), body.messages()
        choice = body.choice()
        with _input_named():
            ask, read = await conversation_ask(
                *(front, request, body, messages, params, choice),
                alone=body.parallel_tool_calls is False,
                template={"chat_template_kwargs": body.chat_template_kwargs},
            )
            model, request_id = front.backend.model.name, request.scope["state"]["request_id"]
            writer = ResponseWriter(model, request_id, body, ask.params, read())
            return await respond(front, request, body, [ask], writer)

    return router
