"""What the endpoints know of the model: a backend that answers token ids with events.

All that passes through it is plain data that can be pickled: an `Ask` goes in, `RequestEvent`s come
out, `report` and `recent` are what JSON can hold. So endpoints may live in processes of their own,
whose backend is a `RemoteBackend`; see `pdjax/serving/processes/`.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pdjax.core.outputs import RequestEvent, RequestOutput
from pdjax.core.request import SamplingParams
from pdjax.core.slo import SLO
from pdjax.request_maker import RequestOptions
from pdjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """The model, as clients see it.

    Attributes:
      name: what `model` of a request says.
      max_model_len: tokens of prompt and output together.
      max_total_tokens: the same, where pools hold less than the longest sequence.
      max_choices: most choices, of all prompts of an HTTP request together: so many sequences may
        wait.
      page_size: tokens a page of KV. Cached tokens are told in whole pages: else a client could
        find another's prompt out token by token.
    """

    name: str
    max_model_len: int
    max_total_tokens: int
    max_choices: int
    page_size: int = 1


@dataclass(frozen=True)
class Ask:
    """One prompt, to be answered.

    Attributes:
      prompt_token_ids: at least one.
      params: how to answer.
      whole: whether each choice comes as one event, at its end.
      labels, priority, deadline, slo, cache_salt, cache_pin: as in `Request`.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    whole: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    deadline: float | None = None
    slo: SLO | None = None
    cache_salt: str | None = None
    cache_pin: float | None = None

    @property
    def options(self) -> RequestOptions:
        """What policies may go by, who shares cached prefixes, and which are kept."""
        return {
            "labels": self.labels,
            "priority": self.priority,
            "deadline": self.deadline,
            "slo": self.slo,
            "cache_salt": self.cache_salt,
            "cache_pin": self.cache_pin,
        }


class Answer(Protocol):
    """The events of one request, as they come; the last one has the whole answer. What a slow
    reader has not taken is merged, so that its memory is bounded by the answer itself.

    Attributes:
      outcome: the whole answer once the request has ended, also after `close`.
    """

    outcome: "asyncio.Future[RequestOutput]"

    def __aiter__(self) -> AsyncIterator[RequestEvent]: ...

    async def __anext__(self) -> RequestEvent: ...

    def close(self) -> None:
        """Read no further; a request that has not ended is aborted, and frees what it holds. The
        iteration ends then. A second call does nothing."""
        ...


class Backend(Protocol):
    """Serves one model. All methods are called from the event loop and never block it.

    Attributes:
      model: what is served.
      tokenizer: of the model; None where it has none, and prompts are token ids.
    """

    model: ServedModel
    tokenizer: Tokenizer | None

    async def submit(self, ask: Ask) -> Answer:
        """Queue a request.

        Raises:
          ValueError: it can never be served; the message names the field.
          QueueFull: the queue has no room now.
          Closed: the backend serves nothing any more.
        """
        ...

    async def report(self) -> dict[str, Any]:
        """The state of engines, pools, queue and links; see `AsyncBackend.report`."""
        ...

    async def recent(self) -> list[dict[str, Any]]:
        """What the newest requests did when; see `pdjax/host/metrics/recent.py`."""
        ...

    async def close(self) -> None:
        """Abort what has not ended, and let go of the engines."""
        ...
