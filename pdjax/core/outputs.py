"""What is answered: the choices of a request as they come and as a whole, and what comes with their
tokens."""

from collections.abc import Sequence as Seq
from dataclasses import KW_ONLY, dataclass, replace
from itertools import chain
from typing import Any

from pdjax.core.logprobs import PromptLogprobs, TokenLogprobs


@dataclass(frozen=True)
class Completion:
    """One choice of an answer.

    Attributes:
      token_ids: generated tokens, without the prompt. `text`: the same as text, cut before a stop
        string.
      finish_reason: "stop" (end token, stop token or stop string), "length", "abort", "error", or
        "shed": refused by `policies.admission` before anything was done for it.
      stop_reason: the stop string or token id that ended it, where one did.
      logprobs: one entry a token, where they were asked for.
      error: why it failed or was shed, where it was.
      metrics: when things happened; see `host/metrics/request.py`.
    """

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: list[TokenLogprobs] | None
    error: str | None
    metrics: Any

    def __repr__(self) -> str:
        failed = f", error={self.error!r}" if self.error else ""
        text = _short(self.text or None, self.token_ids)
        return f"Completion({text}, finish_reason={self.finish_reason!r}{failed})"


@dataclass(frozen=True)
class RequestOutput:
    """The answer to a request. Its own `token_ids`, `text`, ... are those of the first of its
    `choices`.

    Attributes:
      prompt_logprobs: an entry a token of the prompt, where they were asked for and the whole
        prompt was computed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    choices: list[Completion]
    prompt_logprobs: PromptLogprobs | None = None

    def __repr__(self) -> str:
        whole = f"{self.request_id!r}, prompt={_short(self.prompt, self.prompt_token_ids)}"
        return f"RequestOutput({whole}, {', '.join(map(repr, self.choices))})"

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self.choices[0].stop_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.choices[0].logprobs

    @property
    def error(self) -> str | None:
        return self.choices[0].error

    @property
    def metrics(self) -> Any:
        return self.choices[0].metrics


@dataclass(frozen=True)
class RequestEvent:
    """What is new of one choice of a request.

    Attributes:
      text: further text; joined, the texts of a choice's events are the choice's text.
      token_ids: further tokens. Their text may come later, once no later token can change it.
      finish_reason: in the last event of a choice, why it ended; None before.
      output: in the last event of the request, the whole answer; None before.
      choice: which of the request's n choices.
      logprobs: an entry for each of `token_ids`, where they were asked for.
      stop_reason, error: in the last event of a choice; as in Completion.
      prompt_logprobs: in the first event of a choice; as in RequestOutput.
      request_id: of the request.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    output: RequestOutput | None = None
    _: KW_ONLY
    choice: int = 0
    logprobs: list[TokenLogprobs] | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    request_id: str = ""


_MOST_CHARACTERS = 60
"""Most characters of a text that a repr shows."""


def _short(text: str | None, token_ids: list[int]) -> str:
    """A text, or how many tokens there are, in a few words."""
    tokens = f"{len(token_ids)} tokens" if len(token_ids) != 1 else "1 token"
    if text is None:
        return tokens
    shown = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    return f"{shown!r} ({tokens})"


def merged(events: Seq[RequestEvent]) -> RequestEvent:
    """Successive events of one choice as one."""
    last = events[-1]
    if len(events) == 1:
        return last
    logprobs = None
    if last.logprobs is not None:
        logprobs = list(chain.from_iterable(event.logprobs or () for event in events))
    return replace(
        last,
        text="".join(event.text for event in events),
        token_ids=list(chain.from_iterable(event.token_ids for event in events)),
        logprobs=logprobs,
        prompt_logprobs=events[0].prompt_logprobs,
    )
