"""Conversations in the form that chat templates read, from the form that OpenAI's clients send."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pdjax.serving.errors import bad_value, not_supported
from pdjax.text.tokenizer import Tokenizer


def messages_of(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with their content as one text, `developer` as `system`, and the arguments of
    earlier tool calls as objects. An empty list of calls is left out, and calls without a text get
    an empty one, as templates expect and vLLM does.

    Raises:
      ApiError: a 400: a message without a role, or with a part that is no text.
    """
    found = []
    for number, message in enumerate(messages):
        where, role = f"messages[{number}]", message.get("role")
        if not isinstance(role, str) or not role:
            raise bad_value(f"{where}.role", role, "must be a non-empty string")
        turn = {**message, "role": "system" if role == "developer" else role}
        if "content" in turn:
            turn["content"] = text_of(f"{where}.content", turn["content"])
        calls = turn.pop("tool_calls", None)
        if calls is not None and calls != []:
            turn["tool_calls"] = _calls(f"{where}.tool_calls", calls)
            turn["content"] = turn.get("content") or ""
        found.append(turn)
    if not found:
        raise bad_value("messages", [], "must have at least one message")
    return found


def check_template_takes_tools(tokenizer: Tokenizer) -> None:
    """Refuse tools where the model's template would leave them out.

    Raises:
      ApiError: a 400.
    """
    source = tokenizer.chat_template
    texts = source.values() if isinstance(source, dict) else [source or ""]
    if not any("tools" in text for text in texts):
        raise not_supported("tools", "tools: the chat template of this model takes none")


NO_TEXT = (
    *("image_url", "input_audio", "file", "video_url", "audio_url"),
    *("input_image", "input_file", "input_video", "computer_screenshot"),
)
"""Types of a message's parts that only other models read."""


def text_of(where: str, content: Any, kinds: tuple[str, ...] = ("text",)) -> str | None:
    """A message's content; of a list of parts their texts, a line each, as vLLM joins them.

    Args:
      where: the place of the content, for messages.
      content: text, parts or None.
      kinds: types of parts that have text.

    Raises:
      ApiError: a 400: it is neither, or a part is no text.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_value(where, content, "must be text or a list of parts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in NO_TEXT:
            raise not_supported(f"{where}[{number}].type", f"{where}: the model reads text only")
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in kinds or not isinstance(text, str):
            allowed = " or ".join(f'{{"type": "{each}", "text": ...}}' for each in kinds)
            raise bad_value(f"{where}[{number}]", part, f"must be {allowed}")
        texts.append(text)
    return "\n".join(texts)


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Earlier tool calls: clients send the arguments as a string of JSON, templates write them as
    JSON again."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise bad_value(where, calls, "must be a list of tool calls")
    found = []
    for number, call in enumerate(calls):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            arguments = arguments_of(f"{where}[{number}].function", function["arguments"])
            call = {**call, "function": {**function, "arguments": arguments}}
        found.append(call)
    return found


def arguments_of(where: str, text: str) -> dict[str, Any]:
    """The arguments of an earlier call, from JSON; an empty text is none.

    Raises:
      ApiError: a 400: it is no object.
    """
    try:
        arguments = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad_value(f"{where}.arguments", text, "must be a JSON object")
    return arguments
