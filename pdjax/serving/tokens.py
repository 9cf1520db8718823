"""`/tokenize` and `/detokenize`, in the form of vLLM's server."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pdjax.serving.conversations import messages_of
from pdjax.serving.errors import bad_value
from pdjax.serving.front import Front
from pdjax.serving.openapi.document import answers, told
from pdjax.serving.openapi.server_answers import Detokenized, Tokenized, TokenizerInfo
from pdjax.serving.requests import DetokenizeRequest, TokenizeRequest, checked_ids
from pdjax.text.tokenizer import Tokenizer


def routes(front: Front) -> APIRouter:
    """The endpoints."""
    router = APIRouter()

    @router.post("/tokenize", response_model=None, responses=answers(Tokenized))
    async def tokenize(_: Request, body: TokenizeRequest) -> Response:
        """The token ids of a text, or of a conversation."""
        front.check_model(body.model)
        tokenizer = front.tokenizer
        if (body.prompt is None) == (body.messages is None):
            raise bad_value("prompt", body.prompt, "give either prompt or messages")
        if body.messages is not None:
            ids = await front.in_thread(
                tokenizer.apply_chat_template,
                messages_of(body.messages),
                body.add_generation_prompt,
                tools=body.tools or None,
                chat_template_kwargs=body.chat_template_kwargs,
            )
        else:
            ids = await front.in_thread(tokenizer.encode, body.prompt, body.add_special_tokens)
        answer = {
            "count": len(ids),
            "max_model_len": front.backend.model.max_model_len,
            "tokens": ids,
        }
        if body.return_token_strs:
            answer["token_strs"] = await front.in_thread(_each_decoded, tokenizer, ids)
        return JSONResponse(answer)

    @router.post("/detokenize", response_model=None, responses=answers(Detokenized))
    async def detokenize(_: Request, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        front.check_model(body.model)
        tokenizer = front.tokenizer
        ids = checked_ids("tokens", body.tokens, tokenizer.vocab_size)
        return JSONResponse({"prompt": await front.in_thread(tokenizer.decode, ids, False)})

    @router.get("/tokenizer_info", response_model=None, responses=told(TokenizerInfo, 400))
    async def tokenizer_info() -> dict[str, Any]:
        """The tokenizer's special tokens, and the chat template."""
        tokenizer = front.tokenizer
        named = {"bos_token": None, "eos_token": None, "pad_token": None}
        return {
            **named,
            **tokenizer.special_tokens,
            "chat_template": tokenizer.chat_template,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": front.backend.model.max_model_len,
        }

    return router


def _each_decoded(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode([each], False) for each in ids]
