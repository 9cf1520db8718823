"""An answer as it comes: what `LLM.stream` hands out."""

import threading
from dataclasses import dataclass

from pdjax.core.outputs import RequestOutput
from pdjax.entry import Entry
from pdjax.session import Session


@dataclass(frozen=True)
class StreamChunk:
    """What is new in a stream.

    Attributes:
      text: further text; joined, the chunks' texts are the completion's text.
      token_ids: further tokens. Their text may come later, once it is certain.
      finish_reason: why it ended, in the last chunk; None before.
      output: the whole answer, in the last chunk; None before.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    output: RequestOutput | None = None


class Stream:
    """An iterator of StreamChunks. To close it, or to drop it, aborts a request that has not ended.

    A reader may be slow: the stream keeps what has come meanwhile, and no request waits.
    Several threads may read: each chunk goes to one of them.

    Args:
      session: serves the request; each chunk drives it until there is something new.
      entry: a request of one choice that keeps its pieces, and has a listener of its own.
    """

    def __init__(self, session: Session, entry: Entry) -> None:
        self._session, self._entry = session, entry
        self._open = True
        self._reading = threading.RLock()  # a callback that reads its own turn's stream is refused

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> StreamChunk:
        with self._reading:
            while self._open:
                self._session.wait_for_news(self._entry)
                chunk = self._news()
                if chunk.text or chunk.token_ids or not self._open:
                    return chunk
        raise StopIteration

    def close(self) -> None:
        """Stop listening."""
        if self._open:
            self._open = False
            self._session.abort(self._entry.request.id)

    def __del__(self) -> None:
        # The collector may run this anywhere, also in the middle of a turn.
        if self._open and self._entry.answer is None:
            self._session.abort_soon(self._entry.request.id)

    def _news(self) -> StreamChunk:
        """What has come since the last time."""
        answer, pieces = self._entry.answer, self._entry.pieces  # the answer comes after all pieces
        assert pieces is not None, "a stream keeps its pieces"
        tokens, texts = list[int](), list[str]()
        while pieces:
            more, text = pieces.popleft()
            tokens += more
            texts.append(text)
        if answer is None:
            return StreamChunk("".join(texts), tokens)
        self._open = False
        return StreamChunk("".join(texts), tokens, answer.finish_reason, answer)
