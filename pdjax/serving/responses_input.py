"""The input of `/v1/responses` as a conversation for chat templates: messages, and items of earlier
answers, which are reasoning, calls, and what came of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pdjax.core.messages import shown
from pdjax.serving.conversations import arguments_of, text_of
from pdjax.serving.errors import bad_value, not_supported

ROLES = ("user", "assistant", "system", "developer")
TEXTS = ("input_text", "output_text", "text", "reasoning_text")
"""Types of the parts of an item that hold its text."""

Turn = dict[str, Any]


def turns_of(items: Iterable[Mapping[str, Any]]) -> list[Turn]:
    """The turns of a conversation. Reasoning belongs to the model's turn that follows it, and a
    call to the one before it, unless reasoning stands between.

    Raises:
      ApiError: a 400: an item that is none of these, or has a part that is no text.
    """
    turns: list[Turn] = []
    reasoning: str | None = None  # of the model's next turn
    for number, item in enumerate(items):
        where, kind = f"input[{number}]", item.get("type", "message")
        if kind == "reasoning":
            reasoning = text_of(f"{where}.content", item.get("content") or None, TEXTS)
            continue
        if not isinstance(kind, str) or kind not in _KINDS:
            allowed = ", ".join((*_KINDS, "reasoning"))
            raise not_supported(
                f"{where}.type", f"{where}.type={shown(kind)}: must be one of {allowed}"
            )
        turn = _KINDS[kind](where, item)
        is_call, before = "tool_calls" in turn, turns[-1] if turns else {}
        if is_call and reasoning is None and before.get("role") == "assistant":
            turns.pop()
            turn = {**before, "tool_calls": [*before.get("tool_calls", ()), *turn["tool_calls"]]}
        elif reasoning is not None and turn["role"] == "assistant":
            turn["reasoning"], reasoning = reasoning, None
        turns.append(turn)
    return turns


def _message(where: str, item: Mapping[str, Any]) -> Turn:
    role = item.get("role")
    if role not in ROLES:
        raise bad_value(f"{where}.role", role, f"must be one of {', '.join(ROLES)}")
    if item.get("content") is None:
        raise bad_value(f"{where}.content", None, "must be text or a list of parts")
    text = text_of(f"{where}.content", item["content"], TEXTS)
    return {"role": "system" if role == "developer" else role, "content": text}


def _call(where: str, item: Mapping[str, Any]) -> Turn:
    name, call_id = (_text(where, item, key) for key in ("name", "call_id"))
    arguments = arguments_of(where, _text(where, item, "arguments"))
    function = {"name": name, "arguments": arguments}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _output(where: str, item: Mapping[str, Any]) -> Turn:
    output = item.get("output")
    if output is None:
        raise bad_value(f"{where}.output", None, "must be text or a list of parts")
    text = text_of(f"{where}.output", output, TEXTS)
    return {"role": "tool", "tool_call_id": _text(where, item, "call_id"), "content": text}


def _text(where: str, item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise bad_value(f"{where}.{key}", value, "must be text")
    return value


_KINDS: dict[str, Callable[[str, Mapping[str, Any]], Turn]] = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _output,
}
"""Types of items that make a turn."""
