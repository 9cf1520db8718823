"""The items of a response, reasoning, messages and calls, each with the events that tell of it."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from pdjax.serving.chat_message import new_call_id
from pdjax.serving.parsers.parts import Arguments, CallBegins, CallEnds, Part, Reasoning, Text

Tell = Callable[..., bytes]
"""Writes an event of a name, with its fields."""


class _Item(Protocol):
    """An item that grows. A status is "in_progress", "completed" or "incomplete"."""

    kind: type

    def told(self, status: str) -> dict[str, Any]:
        """The item, as far as it came."""
        ...

    def begin(self) -> bytes: ...

    def add(self, text: str) -> bytes: ...

    def end(self, status: str) -> bytes: ...


class _TextItem:
    """A message, or reasoning, of one part."""

    def __init__(
        self, kind: type[Text] | type[Reasoning], request: str, at: int, tell: Tell
    ) -> None:
        self.kind, self._index, self._tell = kind, at, tell
        self._is_message = kind is Text
        self._id = f"{'msg' if self._is_message else 'rs'}_{request}_{at}"
        self._name = "output_text" if self._is_message else "reasoning_text"
        self._pieces: list[str] = []

    def told(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        rest = {"status": status, "content": content}
        if self._is_message:
            return {"id": self._id, "type": "message", "role": "assistant", **rest}
        return {"id": self._id, "type": "reasoning", "summary": [], **rest}

    def begin(self) -> bytes:
        item = self.told("in_progress")
        told = self._tell("output_item.added", output_index=self._index, item=item)
        return told + self._of_part("content_part.added", part=self._part())

    def add(self, text: str) -> bytes:
        self._pieces.append(text)
        return self._of_part(f"{self._name}.delta", delta=text, **self._logprobs())

    def end(self, status: str) -> bytes:
        text, item = "".join(self._pieces), self.told(status)
        return (
            self._of_part(f"{self._name}.done", text=text, **self._logprobs())
            + self._of_part("content_part.done", part=self._part())
            + self._tell("output_item.done", output_index=self._index, item=item)
        )

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = {"type": self._name, "text": "".join(self._pieces)}
        return part | ({"annotations": [], "logprobs": []} if self._is_message else {})

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._is_message else {}

    def _of_part(self, name: str, **fields: Any) -> bytes:
        where = {"item_id": self._id, "output_index": self._index, "content_index": 0}
        return self._tell(name, **where, **fields)


class _CallItem:
    """A call of a tool."""

    kind: type = CallBegins

    def __init__(self, name: str, request: str, at: int, tell: Tell) -> None:
        self._name, self._index, self._tell = name, at, tell
        self._id, self._call_id = f"fc_{request}_{at}", new_call_id()
        self._pieces: list[str] = []

    def told(self, status: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._pieces),
        }

    def begin(self) -> bytes:
        item = self.told("in_progress")
        return self._tell("output_item.added", output_index=self._index, item=item)

    def add(self, text: str) -> bytes:
        self._pieces.append(text)
        return self._of_arguments("delta", delta=text)

    def end(self, status: str) -> bytes:
        item = self.told(status)
        done = self._of_arguments("done", arguments=item["arguments"])
        return done + self._tell("output_item.done", output_index=self._index, item=item)

    def _of_arguments(self, name: str, **fields: Any) -> bytes:
        where = {"item_id": self._id, "output_index": self._index}
        return self._tell(f"function_call_arguments.{name}", **where, **fields)


class OutputItems:
    """The items of one response, in their order; each event is told with what made it.

    Args:
      request_id: of HTTP.
      tell: writes events.

    Attributes:
      items: those that have ended.
    """

    def __init__(self, request_id: str, tell: Tell) -> None:
        self._request, self._tell = request_id, tell
        self.items: list[dict[str, Any]] = []
        self._open: _Item | None = None

    def take(self, parts: Iterable[Part]) -> bytes:
        """Take further parts of the answer."""
        told = b""
        for part in parts:
            if isinstance(part, CallEnds):
                told += self._end("completed")
            elif isinstance(part, CallBegins):
                where = (self._request, self._next_index(), self._tell)
                told += self._begin(_CallItem(part.name, *where))
            elif isinstance(part, Arguments):
                assert self._open is not None, "arguments are of a call"
                told += self._open.add(part.text)
            elif isinstance(part, Text | Reasoning):
                told += self._add_text(type(part), part.text)
        return told

    def end(self, is_cut: bool) -> bytes:
        """End the last item; a response without any has an empty message.

        Args:
          is_cut: whether the answer would have gone on.
        """
        told = b""
        if self._open is None and not self.items:
            told = self._begin(_TextItem(Text, self._request, 0, self._tell))
        return told + self._end("incomplete" if is_cut else "completed")

    def _add_text(self, kind: type[Text] | type[Reasoning], text: str) -> bytes:
        told = b""
        if self._open is None or self._open.kind is not kind:
            item = _TextItem(kind, self._request, self._next_index(), self._tell)
            told = self._begin(item)
        assert self._open is not None
        return told + self._open.add(text)

    def _next_index(self) -> int:
        return len(self.items) + (self._open is not None)

    def _begin(self, item: _Item) -> bytes:
        told = self._end("incomplete" if self._is_in_call() else "completed")
        self._open = item
        return told + item.begin()

    def _end(self, status: str) -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        self.items.append(item.told(status))
        return item.end(status)

    def _is_in_call(self) -> bool:
        return self._open is not None and self._open.kind is CallBegins
