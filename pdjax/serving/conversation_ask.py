"""What a conversation asks of the backend, and what reads the answer: chats and responses alike."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request

from pdjax.core.request import SamplingParams
from pdjax.serving.backend import Ask
from pdjax.serving.conversations import check_template_takes_tools
from pdjax.serving.front import Front, labels_of
from pdjax.serving.parsers.answer import AnswerReader
from pdjax.serving.requests import SampledRequest
from pdjax.serving.tool_choice import ToolChoice


async def conversation_ask(
    front: Front,
    request: Request,
    body: SampledRequest,
    messages: list[dict[str, Any]],
    params: SamplingParams,
    choice: ToolChoice,
    *,
    alone: bool,
    generates: bool = True,
    template: Mapping[str, Any],
) -> tuple[Ask, Callable[[], AnswerReader]]:
    """Put a conversation into the model's template.

    Args:
      body: what was asked.
      messages: in the form that templates read.
      params: of the body; it gets its bound, the markers of calls and the form of a forced one.
      choice: the tools that may be called.
      alone: whether calls after the first one are left out.
      generates: whether the prompt ends with the start of an answer.
      template: further arguments of the template.

    Returns:
      the ask, and what makes a reader for each of its choices.

    Raises:
      ApiError: a 400: there is no template, it takes no tools, or it refuses the conversation.
    """
    if choice.tools is not None:
        check_template_takes_tools(front.tokenizer)
    ids = await front.in_thread(
        front.tokenizer.apply_chat_template, messages, generates, tools=choice.tools, **template
    )
    params = replace(
        params,
        max_tokens=front.bounded(params, len(ids)),
        shown_tokens=front.syntax.shown_tokens(choice.tools is not None),
        guide=choice.guide(front.syntax.arguments) or params.guide,
    )
    labels = labels_of(request.scope["state"], body.user)
    ask = Ask(tuple(ids), params, not body.stream, labels, **body.wishes())
    return ask, partial(front.syntax.reader, ids, choice, alone, params.guide is not None)
