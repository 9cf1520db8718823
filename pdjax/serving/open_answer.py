"""An answer under way, as a server counts it."""

import asyncio
from collections.abc import AsyncIterator

from pdjax.core.clock import unix_ns
from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.serving.backend import Answer, Ask
from pdjax.serving.metrics import ServerMetrics


class OpenAnswer:
    """An answer that is counted: its tokens as they are read; and at its end all of it, also what
    had been generated before a client left.

    Args:
      answer: of the backend.
      ask: what it answers.
      metrics: count it.
      answers: those under way; it is one of them until it is read no further.

    Attributes:
      generated: tokens read so far, of all choices.
      outcome: the whole answer once the request has ended; of the backend.
      submitted_ns: when it was submitted, nanoseconds since 1970.
    """

    def __init__(
        self, answer: Answer, ask: Ask, metrics: ServerMetrics, answers: set["OpenAnswer"]
    ) -> None:
        self.ask, self.generated, self.submitted_ns = ask, 0, unix_ns()
        self.outcome = answer.outcome
        self._answer, self._metrics, self._answers = answer, metrics, answers
        self._open = True
        self._output: RequestOutput | None = None
        answers.add(self)
        metrics.submitted(ask.params)
        answer.outcome.add_done_callback(self._known)

    def __aiter__(self) -> AsyncIterator[RequestEvent]:
        return self

    async def __anext__(self) -> RequestEvent:
        try:
            event = await self._answer.__anext__()
        except StopAsyncIteration:
            self.close()
            raise
        count = len(event.token_ids)
        self.generated += count
        self._metrics.tokens(count)
        if event.output is not None and self._open:
            self._end()
            self._count(event.output)
        return event

    def close(self) -> None:
        """Read no further; a request that has not ended is aborted."""
        if self._open:
            self._end()
            self._answer.close()
            if self._answer.outcome.done():
                self._known(self._answer.outcome)

    def _end(self) -> None:
        self._open = False
        self._answers.discard(self)

    def _known(self, outcome: "asyncio.Future[RequestOutput]") -> None:
        """It has ended. What nobody will read is counted here."""
        if not self._open and not outcome.cancelled():
            self._count(outcome.result())

    def _count(self, output: RequestOutput) -> None:
        if self._output is None:
            self._output = output
            every = sum(len(choice.token_ids) for choice in output.choices)
            self._metrics.tokens(every - self.generated)
            self._metrics.ended(output)
