"""`/v1/responses`: a text or a conversation, answered in plain text. Nothing is kept: each request
brings its whole conversation."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pdjax.core.clock import unix_time
from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.core.request import SamplingParams
from pdjax.serving import sse
from pdjax.serving.backend import Ask
from pdjax.serving.errors import ApiError
from pdjax.serving.front import Front, labels_of
from pdjax.serving.generation import STREAMS, Usage, admit, respond
from pdjax.serving.responses_body import ResponsesRequest


class ResponseWriter:
    """Writes what `/v1/responses` answers: a response with one message of one text.

    A stream tells of the response, the message and its part before the first text, then each text
    as it comes, and at last all of them whole. What goes before the first text comes with it, so
    that a request that fails until then has a status of its own.

    Args:
      model: its name.
      request_id: of HTTP.
      body: what was asked.
      params: how it is answered.
    """

    def __init__(
        self, model: str, request_id: str, body: ResponsesRequest, params: SamplingParams
    ) -> None:
        self._item_id = f"msg_{request_id}"
        self._number = 0
        self._text = ""
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
            "text": {"format": {"type": "text"}},
            "background": False,
            "store": False,
            "previous_response_id": None,
            "truncation": "disabled",
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
        }

    def whole(self, outputs: Seq[RequestOutput], usage: Usage) -> dict[str, Any]:
        [output] = outputs
        [choice] = output.choices
        self._text, self._finish_reason = choice.text, choice.finish_reason
        return self._ended(usage)

    def events(self, number: int, event: RequestEvent, usage: Usage) -> bytes:
        told = b"" if self._number else self._begin()
        self._text += event.text
        self._finish_reason = event.finish_reason
        if event.text:
            told += self._of_part("output_text.delta", delta=event.text, logprobs=[])
        return told

    def end(self, usage: Usage) -> bytes:
        response = self._ended(usage)
        [item] = response["output"]
        [part] = item["content"]
        return (
            self._of_part("output_text.done", text=self._text, logprobs=[])
            + self._of_part("content_part.done", part=part)
            + self._event("output_item.done", output_index=0, item=item)
            + self._event(response["status"], response=response)
        )

    def failure(self, error: ApiError) -> bytes:
        body = error.body()
        told = {key: body["error"][key] for key in ("code", "message", "param")}
        return sse.typed({"type": "error", "sequence_number": self._next(), **told, **body})

    def _begin(self) -> bytes:
        response = self._response("in_progress", [])
        item = self._item("in_progress", [])
        return (
            self._event("created", response=response)
            + self._event("in_progress", response=response)
            + self._event("output_item.added", output_index=0, item=item)
            + self._of_part("content_part.added", part=_part(""))
        )

    def _event(self, name: str, **fields: Any) -> bytes:
        kind = {"type": f"response.{name}", "sequence_number": self._next()}
        return sse.typed(kind | fields)

    def _of_part(self, name: str, **fields: Any) -> bytes:
        where = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return self._event(name, **where, **fields)

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        kind = {"id": self._item_id, "type": "message", "role": "assistant"}
        return {**kind, "status": status, "content": content}

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
        """The response with its whole text; one that `max_output_tokens` or the context has cut
        is incomplete."""
        reason = "max_output_tokens" if self._finish_reason == "length" else None
        status = "completed" if reason is None else "incomplete"
        item = self._item(status, [_part(self._text)])
        return self._response(status, [item], reason, _usage(usage()))


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(used: dict[str, Any]) -> dict[str, Any]:
    """Usage in the form of responses. Pools keep what was prefilled by themselves: nothing is
    written at a client's wish."""
    cached = used["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
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


def routes(front: Front) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/responses", responses=STREAMS)
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        """Answer a text or a conversation."""
        admit(front, request, body)
        params, messages = body.params(), body.messages()
        with _input_named():
            ids = await front.in_thread(
                front.tokenizer.apply_chat_template,
                messages,
                True,
                chat_template_kwargs=body.chat_template_kwargs,
            )
            params = replace(params, max_tokens=front.bounded(params, len(ids)))
            state = request.scope["state"]
            ask = Ask(tuple(ids), params, not body.stream, labels_of(state, body.user))
            model, request_id = front.backend.model.name, state["request_id"]
            writer = ResponseWriter(model, request_id, body, params)
            return await respond(front, request, body, [ask], writer)

    return router
