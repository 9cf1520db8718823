"""An answer as it comes: what `LLM.stream` hands out."""

from dataclasses import dataclass
from typing import Protocol

from pdjax.request import RequestOutput, Sequence


@dataclass(frozen=True)
class StreamChunk:
    """What is new in a stream.

    Attributes:
      text: further text; joined, the chunks' texts are the completion's text.
      token_ids: further tokens. Their text may come later, once it is certain.
      finish_reason: why it ended, in the last chunk; None before.
      output: the whole answer, in the last chunk; None before, and if somebody else took it.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    output: RequestOutput | None = None


class Serving(Protocol):
    """What a stream needs of an LLM."""

    def step(self) -> None: ...

    def take_output(self, request_id: str) -> RequestOutput | None: ...

    def abort(self, request_id: str) -> None: ...


class Stream:
    """An iterator of StreamChunks. Closing it, or dropping it, aborts what is not finished.

    Args:
      llm: serves the request; each chunk steps it until there is something new.
      request_id: of a request that was submitted and whose output nobody else takes.
      sequence: its only choice.
    """

    def __init__(self, llm: Serving, request_id: str, sequence: Sequence) -> None:
        self._llm, self._request_id, self._sequence = llm, request_id, sequence
        self._shown = 0  # tokens
        self._open = True

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> StreamChunk:
        while self._open:
            if not self._sequence.done:
                self._llm.step()
            chunk = self._news()
            if chunk.text or chunk.token_ids or not self._open:
                return chunk
        raise StopIteration

    def close(self) -> None:
        """Stop listening."""
        if self._open:
            self._open = False
            self._llm.abort(self._request_id)
            self._llm.take_output(self._request_id)

    def __del__(self) -> None:
        self.close()

    def _news(self) -> StreamChunk:
        """What has come since the last time."""
        sequence = self._sequence
        tokens = sequence.output[self._shown :]
        self._shown += len(tokens)
        text = sequence.text.take() if sequence.text is not None else ""
        if not sequence.done:
            return StreamChunk(text, tokens)
        self._open = False
        output = self._llm.take_output(self._request_id)
        return StreamChunk(text, tokens, sequence.finish_reason, output)
