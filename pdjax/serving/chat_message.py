"""The message of a chat's answer, whole or as deltas: text, reasoning, and calls of tools."""

import secrets
import string
from collections.abc import Sequence as Seq
from typing import Any

from pdjax.serving.parsers.answer import AnswerReader
from pdjax.serving.parsers.parts import Arguments, CallBegins, Reasoning, Text

_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9


def new_call_id() -> str:
    """The id of a call. Mistral's templates refuse any that is not nine letters and digits."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


class ChatMessage:
    """Writes the message of one choice.

    Args:
      reader: of the choice's text.
      has_reasoning: whether it tells the reasoning.
    """

    def __init__(self, reader: AnswerReader, has_reasoning: bool = True) -> None:
        self.reader, self._has_reasoning = reader, has_reasoning
        self._calls = 0  # that have begun

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the choice ended, by the reason that its tokens ended: calls may be the reason for
        that."""
        return "tool_calls" if reason == "stop" and self.reader.has_call else reason

    def whole(self, text: str, token_ids: Seq[int] = ()) -> dict[str, Any]:
        """The message of a whole text, and its tokens."""
        texts, reasoning, calls = list[str](), list[str](), list[dict[str, Any]]()
        parts = self.reader.whole(text, token_ids)
        for part in parts:
            if isinstance(part, Text):
                texts.append(part.text)
            elif isinstance(part, Reasoning):
                reasoning.append(part.text)
            elif isinstance(part, CallBegins):
                calls.append(_call(part.name))
            elif isinstance(part, Arguments):
                calls[-1]["function"]["arguments"] += part.text
        message: dict[str, Any] = {"content": "".join(texts) if texts or not parts else None}
        if reasoning and self._has_reasoning:
            message["reasoning"] = "".join(reasoning)
        if calls:
            message["tool_calls"] = calls
        return message

    def delta(self, text: str, token_ids: Seq[int] = (), *, ended: bool) -> dict[str, Any]:
        """What further text adds to the message; may be nothing.

        Args:
          text, token_ids: of the choice.
          ended: whether no more follows.
        """
        fields: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for part in self.reader.push(text, token_ids, ended=ended):
            if isinstance(part, Text):
                fields["content"] = fields.get("content", "") + part.text
            elif isinstance(part, Reasoning):
                if self._has_reasoning:
                    fields["reasoning"] = fields.get("reasoning", "") + part.text
            elif isinstance(part, CallBegins):
                calls[self._calls] = {"index": self._calls, **_call(part.name)}
                self._calls += 1
            elif isinstance(part, Arguments):
                index = self._calls - 1
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += part.text
        if calls:
            fields["tool_calls"] = list(calls.values())
        return fields


def _call(name: str) -> dict[str, Any]:
    return {"id": new_call_id(), "type": "function", "function": {"name": name, "arguments": ""}}
