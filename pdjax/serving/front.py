"""What the endpoints of one server share: the backend, its settings, and the answers under way."""

import asyncio
import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, TypeVar

from pdjax.core.messages import prompt_too_long
from pdjax.core.request import QueueFull, SamplingParams
from pdjax.serving.backend import Ask, Backend
from pdjax.serving.errors import ApiError, bad_value, draining, of_submit
from pdjax.serving.keys import ApiKey
from pdjax.serving.metrics import ServerMetrics
from pdjax.serving.open_answer import OpenAnswer
from pdjax.serving.parsers.answer import AnswerSyntax
from pdjax.serving.parsers.registry import AUTO
from pdjax.serving.text_threads import TextThreads
from pdjax.serving.traces import Traces
from pdjax.serving.urls import url_parts
from pdjax.session import Closed
from pdjax.text.tokenizer import Tokenizer

ResultT = TypeVar("ResultT")

MOST_SCORES = 1 << 21
"""Log-probabilities of prompts in one response: some 100 MB of JSON."""


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
      api_keys: who may ask; where there are none, everyone may.
      max_body: bytes of a request's body.
      body_s: seconds in which a body must have come.
      drain_s: seconds that answers under way have, once the server is to end.
      stall_s: seconds after which a client that takes nothing is cut off.
      cors_origins: origins whose pages a browser lets read answers, as `https://host`; "*" is all.
      vllm_metric_names: whether metrics that vLLM has, too, bear its names.
      tool_call_parser, reasoning_parser: names of `parsers/registry.py`; "auto" goes by the model's
        chat template, and "none" leaves all as text.
      traces_url: where spans of requests are posted to, as OTLP; None makes none.
    """

    api_keys: tuple[ApiKey, ...] = ()
    max_body: int = 16 << 20
    body_s: float = 60.0
    drain_s: float = 30.0
    stall_s: float = 60.0
    cors_origins: tuple[str, ...] = ()
    vllm_metric_names: bool = False
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    traces_url: str | None = None

    def __post_init__(self) -> None:
        if self.max_body < 1:
            raise ValueError(f"max_body={self.max_body}: must be at least 1 byte")
        for name in ("body_s", "drain_s", "stall_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more seconds")
        for origin in self.cors_origins:
            has_form = re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin)
            if origin != "*" and not (has_form and url_parts(origin)):
                raise ValueError(
                    f"cors_origins: {origin!r} must be a scheme and a host, as https://host:8080, "
                    "with a port in [1, 65536) and without a path; or * for all"
                )


def syntax_of(backend: Backend, settings: Settings) -> AnswerSyntax:
    """How the model writes calls of tools and its reasoning.

    Raises:
      ValueError: settings name a parser that there is not.
    """
    names = settings.tool_call_parser, settings.reasoning_parser
    return AnswerSyntax(backend.tokenizer, *names)


class Front:
    """One server's state. All of it belongs to the event loop.

    Args:
      backend: serves the model.
      settings: how to behave.

    Raises:
      ValueError: settings name a parser that there is not, or ask for traces, and what sends them
        is not installed.

    Attributes:
      syntax: how the model writes calls of tools and its reasoning.
      metrics: what has been served.
      answers: those under way.
      requests: HTTP requests under way.
      is_draining: whether no further request is let in.
      traces: take the requests that have ended; None where nobody asks for them.
    """

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.backend, self.settings = backend, settings
        model = backend.model
        self.syntax = syntax_of(backend, settings)
        self.metrics = ServerMetrics(model.name, model.max_model_len, settings.vllm_metric_names)
        self.answers: set[OpenAnswer] = set()
        self.requests = 0
        self.is_draining = False
        self.traces = settings.traces_url and Traces(settings.traces_url, model.name)
        self._texts = TextThreads()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          ApiError: a 400: it has none.
        """
        if self.backend.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer; give token ids", param="prompt")
        return self.backend.tokenizer

    async def in_thread(self, call: Callable[..., ResultT], *args: Any, **how: Any) -> ResultT:
        """Call it outside the event loop, unless its arguments are brief: a text may be long.

        Raises:
          ApiError: a 400 for a ValueError.
        """
        try:
            return await self._texts.call(call, *args, **how)
        except ValueError as error:
            self.metrics.refused("invalid")
            raise of_submit(error) from error

    async def in_long_thread(self, call: Callable[..., ResultT], *args: Any, **how: Any) -> ResultT:
        """Call what may take long outside the event loop, apart from short texts."""
        return await self._texts.call_long(call, *args, **how)

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name; no name is this one's.

        Raises:
          ApiError: a 404.
        """
        if name is not None and name != self.backend.model.name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist; this server has "
                f"{self.backend.model.name!r}",
                param="model",
                code="model_not_found",
            )

    def check_open(self) -> None:
        """Refuse what comes while the server drains.

        Raises:
          ApiError: a 503.
        """
        if self.is_draining:
            self.metrics.refused("draining")
            raise draining()

    def bounded(self, params: SamplingParams, prompt_tokens: int) -> int:
        """`max_tokens` of a request without one: to the end of the context, or of what pools
        hold."""
        if params.max_tokens is not None:
            return params.max_tokens
        return max(1, self.backend.model.max_total_tokens - prompt_tokens)

    async def submit(self, asks: Seq[Ask]) -> list[OpenAnswer]:
        """Submit all of them, or none.

        Raises:
          ApiError: a 400, 429 or 503.
        """
        self.check_open()
        for ask in asks:
            self._check_length(len(ask.prompt_token_ids))
        self._check_scores(asks)
        answers: list[OpenAnswer] = []
        try:
            for ask in asks:
                answer = await self.backend.submit(ask)
                answers.append(OpenAnswer(answer, ask, self.metrics, self.answers))
        except BaseException as error:
            for each in answers:
                each.close()
            if isinstance(error, ValueError | QueueFull | Closed):
                full = "queue_full" if isinstance(error, QueueFull) else "invalid"
                self.metrics.refused("draining" if isinstance(error, Closed) else full)
                raise of_submit(error) from error
            raise
        return answers

    def _check_length(self, prompt_tokens: int) -> None:
        """Refuse a prompt that is too long before it is passed on.

        Raises:
          ApiError: a 400.
        """
        context = self.backend.model.max_model_len
        if prompt_tokens >= context:
            self.metrics.refused("invalid")
            raise of_submit(ValueError(prompt_too_long(prompt_tokens, context)))

    def _check_scores(self, asks: Seq[Ask]) -> None:
        """Refuse prompts of which one response would have too many log-probabilities.

        Raises:
          ApiError: a 400.
        """
        top = max((ask.params.prompt_logprobs or 0 for ask in asks), default=0)
        scored = [ask for ask in asks if ask.params.prompt_logprobs is not None]
        count = sum(len(ask.prompt_token_ids) for ask in scored) * (1 + top)
        if count > MOST_SCORES:
            self.metrics.refused("invalid")
            raise bad_value(
                "prompt",
                f"{len(scored)} prompts",
                f"have {count} log-probabilities, with the {top} likeliest of each token; must be "
                f"at most {MOST_SCORES}, so send fewer prompts at once, or ask for fewer",
            )

    def abort_all(self) -> None:
        """Close every answer under way."""
        for answer in list(self.answers):
            answer.close()

    async def close(self) -> None:
        """Let go of the backend."""
        self.abort_all()
        self._texts.close()
        await self.backend.close()
        if self.traces:
            await asyncio.to_thread(self.traces.close)  # it waits for the collector


def labels_of(state: Mapping[str, Any], user: str | None) -> dict[str, str]:
    """The labels of a request, for policies and observers: its id of HTTP, its trace, its key,
    its user."""
    known = {
        "http_request": state.get("request_id"),
        "trace_id": state.get("trace_id"),
        "api_key": state.get("key"),
        "user": user,
    }
    return {name: str(value)[:512] for name, value in known.items() if value}
