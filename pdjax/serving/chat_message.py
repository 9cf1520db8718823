"""The message of a chat's answer, whole or as deltas: text, reasoning, and calls of tools."""

import secrets
import string
from collections.abc import Sequence as Seq
from typing import Any

from pdjax.serving.parsers.answer import AnswerReader
from pdjax.serving.parsers.parts import (
    Arguments,
    CallBegins,
    CallEnds,
    NoCall,
    Part,
    Reasoning,
    Text,
)
from pdjax.serving.parsers.reasoning import ReasoningCount

_ID_CHARACTERS = string.ascii_letters + string.digits
_ID_LENGTH = 9


def _new_id() -> str:
    """The id of a call. Mistral's templates refuse any that is not nine letters and digits."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


class ChatMessage:
    """Writes the message of one choice.

    A call that turns out to be none is text again in a whole message. In deltas it stays as far as
    it was told, and the rest is text: what was told can't be taken back.

    Args:
      reader: of the choice's text.
      count: of its reasoning's tokens; None where they can't be counted.
      has_reasoning: whether it tells the reasoning.
    """

    def __init__(
        self,
        reader: AnswerReader,
        count: ReasoningCount | None = None,
        has_reasoning: bool = True,
    ) -> None:
        self._reader, self._count, self._has_reasoning = reader, count, has_reasoning
        self._reasons = self._answers = False  # whether there was reasoning, or anything else
        self._calls = 0  # that have begun
        self._has_call = False

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the choice ended, by the reason that its tokens ended: calls may be the reason for
        that."""
        return "tool_calls" if reason == "stop" and self._has_call else reason

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of the reasoning so far; None where that can't be known, as of markers that were
        spelt with other tokens than their own."""
        count = self._count
        if count is None or (self._answers and count.is_open):
            return None
        return None if self._reasons and not count.tokens else count.tokens

    def whole(self, text: str, token_ids: Seq[int] = ()) -> dict[str, Any]:
        """The message of a whole text, and its tokens."""
        texts, reasoning, calls = list[str](), list[str](), list[dict[str, Any]]()
        parts = self._parts(text, token_ids, ended=True)
        for part in parts:
            if isinstance(part, Text):
                texts.append(part.text)
            elif isinstance(part, Reasoning):
                reasoning.append(part.text)
            elif isinstance(part, CallBegins):
                calls.append(_call(part.name))
            elif isinstance(part, Arguments):
                calls[-1]["function"]["arguments"] += part.text
            elif isinstance(part, NoCall):
                if part.untold != part.text:
                    calls.pop()
                texts.append(part.text)
        is_text = texts or not parts
        message: dict[str, Any] = {"content": "".join(texts) if is_text else None}
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
        for part in self._parts(text, token_ids, ended):
            if isinstance(part, Text | NoCall):
                told = part.untold if isinstance(part, NoCall) else part.text
                fields["content"] = fields.get("content", "") + told
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

    def _parts(self, text: str, token_ids: Seq[int], ended: bool) -> list[Part]:
        if self._count is not None:
            self._count.push(token_ids)
        parts = self._reader.push(text)
        if ended:
            parts += self._reader.finish()
        self._has_call |= any(isinstance(part, CallEnds) for part in parts)
        for part in parts:
            is_reasoning = isinstance(part, Reasoning)
            self._reasons |= is_reasoning
            self._answers |= not is_reasoning
        return parts


def _call(name: str) -> dict[str, Any]:
    return {"id": _new_id(), "type": "function", "function": {"name": name, "arguments": ""}}
