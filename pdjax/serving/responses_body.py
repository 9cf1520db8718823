"""The body of `/v1/responses`: text and tools, and nothing that is kept between requests."""

import json
from collections.abc import Iterator
from typing import Any, ClassVar

from pdjax.core.guide import Guide
from pdjax.core.messages import shown
from pdjax.core.request import SamplingParams
from pdjax.serving.errors import ApiError, bad_value, not_supported
from pdjax.serving.guides import of_format
from pdjax.serving.requests import HARMLESS, REFUSED, Many, SampledRequest
from pdjax.serving.responses_input import turns_of
from pdjax.serving.tool_choice import ToolChoice, tool_choice_of

RESPONSES_REFUSED: dict[str, tuple[Any, ...]] = {
    **REFUSED,
    "store": (False,),
    **dict.fromkeys(["previous_response_id", "conversation"], ()),
    "background": (False,),
    "max_tool_calls": (),
    "include": ([],),
    "logprobs": (False,),
    "prompt_logprobs": (),
    "top_logprobs": (0,),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
    "truncation": ("disabled",),
    **dict.fromkeys(["prompt", "moderation", "image"], ()),
    "context_management": ([],),
    "stream_options": ({}, {"include_obfuscation": False}),
    "n": (1,),
    **dict.fromkeys(["max_tokens", "max_completion_tokens", "messages"], ()),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
"""Fields that are known and not supported here, each with the values that ask for nothing."""

_KEPT = "this server keeps no responses; send the whole conversation as `input`"
_INSTEAD = {
    "store": f"store: {_KEPT}, and leave store out or false",
    "previous_response_id": f"previous_response_id: {_KEPT}",
    "conversation": f"conversation: {_KEPT}",
    "background": "background: this server keeps no responses; stream the answer instead",
    "prompt": "prompt: this server keeps no prompts; the text belongs into `input`",
    "messages": "messages: a conversation belongs into `input`",
    "response_format": "response_format: the form of a response belongs into `text.format`",
    **dict.fromkeys(
        ["max_tokens", "max_completion_tokens"], "the bound of a response is `max_output_tokens`"
    ),
}
"""What to do instead, where there is something."""


class ResponsesRequest(SampledRequest):
    """The body of `/v1/responses`."""

    refused: ClassVar = RESPONSES_REFUSED
    harmless: ClassVar = (HARMLESS - {"store"}) | {
        *("access_programs", "background_options", "prompt_cache_options"),
    }

    input: str | Many[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    text: dict[str, Any] | None = None
    tools: Many[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def unknown_fields(self) -> list[str]:
        try:
            return super().unknown_fields()
        except ApiError as error:
            if error.param not in _INSTEAD:
                raise
            raise not_supported(error.param, _INSTEAD[error.param]) from None

    def params(self) -> SamplingParams:
        """How to answer; without a bound, to the end of the context.

        Raises:
          ApiError: a 400.
        """
        for name, told in self._told_again():
            try:
                json.dumps(told, ensure_ascii=False, allow_nan=False).encode()
            except (ValueError, RecursionError) as error:  # also half of a surrogate pair
                allowed = "must be text that UTF-8 can hold, and numbers that JSON has"
                raise bad_value(name, told, allowed) from error
        most = self.max_output_tokens
        if most is not None and most < 1:
            raise bad_value("max_output_tokens", most, "must be at least 1")
        return self.sampling_params(max_tokens=most)

    @property
    def format(self) -> dict[str, Any] | None:
        """The form of the text, in OpenAI's words.

        Raises:
          ApiError: a 400: it is no object.
        """
        asked = (self.text or {}).get("format")
        if not isinstance(asked, dict | None):
            raise bad_value("text.format", asked, "must be an object")
        return asked

    def guides(self) -> Iterator[Guide]:
        yield from super().guides()
        yield from of_format("text.format", self.format, None)

    def _told_again(self) -> Iterator[tuple[str, object]]:
        """What the response repeats, each with its field."""
        for name in ("metadata", "user", "instructions", "tools", "tool_choice"):
            yield name, getattr(self, name)
        yield "text.format", self.format

    def choice(self) -> ToolChoice:
        """Which tools may be called, and whether one must be.

        Raises:
          ApiError: a 400, also of a tool that is no function.
        """
        tools = [_function(f"tools[{i}]", tool) for i, tool in enumerate(self.tools or ())]
        return tool_choice_of(tools, self.tool_choice)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation in the form that chat templates read; `instructions` go before it.

        Raises:
          ApiError: a 400: an item of another kind, or with a part that is no text.
        """
        told = self.instructions
        first = [] if told is None else [{"role": "system", "content": told}]
        if isinstance(self.input, str):
            return [*first, {"role": "user", "content": self.input}]
        if not self.input:
            raise bad_value("input", [], "must have at least one message")
        return [*first, *turns_of(self.input)]


def _function(where: str, tool: dict[str, Any]) -> dict[str, Any]:
    """A tool in the form of chats."""
    kind, name = tool.get("type"), tool.get("name")
    if kind != "function":
        raise not_supported(f"{where}.type", f"{where}.type={shown(kind)}: must be function")
    if not isinstance(name, str) or not name:
        raise bad_value(f"{where}.name", name, "must be text that is not empty")
    keys = ("name", "description", "parameters")
    function = {key: tool[key] for key in keys if tool.get(key) is not None}
    return {"type": "function", "function": function}
