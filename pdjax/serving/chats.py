"""`/v1/chat/completions`: a conversation, answered through the model's own template."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pdjax.core.clock import unix_time
from pdjax.core.outputs import Completion, RequestEvent, RequestOutput
from pdjax.serving.backend import Ask
from pdjax.serving.chat_message import ChatMessage
from pdjax.serving.conversation_ask import conversation_ask
from pdjax.serving.conversations import messages_of
from pdjax.serving.errors import fields_called
from pdjax.serving.front import Front
from pdjax.serving.generation import ChunkWriter, Usage, admit, respond
from pdjax.serving.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from pdjax.serving.openapi.answers import ChatCompletion, ChatCompletionChunk
from pdjax.serving.openapi.document import answers, chunks
from pdjax.serving.parsers.answer import AnswerReader
from pdjax.serving.requests import ChatRequest


class ChatWriter(ChunkWriter):
    """Writes what `/v1/chat/completions` answers. The first chunk of a choice has its role and a
    content, be it empty, beside its first token: one of its own would be taken for a token by some
    load generators, and clients need both.

    Args:
      front: has the model's name and tokenizer.
      request_id: of HTTP.
      body: what was asked.
      ask: the conversation.
      read: makes what reads a choice.
    """

    def __init__(
        self,
        front: Front,
        request_id: str,
        body: ChatRequest,
        ask: Ask,
        read: Callable[[], AnswerReader],
    ) -> None:
        super().__init__(body)
        self._body, self._ask, self._read = body, ask, read
        by_id = bool(body.return_tokens_as_token_ids)
        self._names = TokenNames(front.backend.tokenizer, by_id=by_id)
        self._messages: dict[int, ChatMessage] = {}
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion",
            "created": unix_time(),
            "model": front.backend.model.name,
        }

    def answer(self, outputs: Seq[RequestOutput]) -> dict[str, Any]:
        [output] = outputs
        choices = []
        for index, each in enumerate(output.choices):
            message = self._messages[index] = self._message()
            told = {"role": "assistant", **message.whole(each.text, each.token_ids)}
            choices.append({"index": index, "message": told, **self._rest(each, message)})
        more = self._prompt()
        if self._body.prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(
                self._names, output.prompt_logprobs, self._body.prompt_logprobs
            )
        return {**self._head, "choices": choices, **more}

    def chunk(self, number: int, event: RequestEvent) -> dict[str, Any]:
        prompt = {} if self._messages else self._prompt()
        delta: dict[str, Any] = {}
        message = self._messages.get(event.choice)
        if message is None:
            message = self._messages[event.choice] = self._message()
            delta = {"role": "assistant", "content": ""}
        elif not message.reader.reads:
            delta["content"] = ""
        delta |= message.delta(event.text, event.token_ids, ended=event.finish_reason is not None)
        choice = {"index": event.choice, "delta": delta, **self._rest(event, message)}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **prompt}

    def used(self, usage: Usage) -> dict[str, Any]:
        counts = [message.reader.reasoning_tokens for message in self._messages.values()]
        tokens = [count for count in counts if count is not None]
        if not counts or len(tokens) < len(counts):
            return usage()
        return usage() | {"completion_tokens_details": {"reasoning_tokens": sum(tokens)}}

    def last(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": []}

    def _message(self) -> ChatMessage:
        return ChatMessage(self._read(), self._body.include_reasoning is not False)

    def _rest(self, new: Completion | RequestEvent, message: ChatMessage) -> dict[str, Any]:
        logprobs = new.logprobs
        written = None if logprobs is None else chat_logprobs(self._names, new.token_ids, logprobs)
        ids = {"token_ids": new.token_ids} if self._body.return_token_ids else {}
        return {
            "logprobs": written,
            "finish_reason": message.finish_reason(new.finish_reason),
            "stop_reason": new.stop_reason,
            **ids,
        }

    def _prompt(self) -> dict[str, Any]:
        if not self._body.return_token_ids:
            return {}
        return {"prompt_token_ids": list(self._ask.prompt_token_ids)}


ANSWERS = answers(ChatCompletion, stream=chunks(ChatCompletionChunk), limited=True)


def routes(front: Front) -> APIRouter:
    """The endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", responses=ANSWERS)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        admit(front, request, body)
        with fields_called(body.called):
            params, choice = body.params(), body.choice()
            ask, read = await conversation_ask(
                *(front, request, body, messages_of(body.messages), params, choice),
                alone=body.parallel_tool_calls is False,
                generates=body.add_generation_prompt is not False,
                template={
                    "documents": body.documents,
                    "chat_template_kwargs": body.chat_template_kwargs,
                },
            )
            writer = ChatWriter(front, request.scope["state"]["request_id"], body, ask, read)
            return await respond(front, request, body, [ask], writer)

    return router
