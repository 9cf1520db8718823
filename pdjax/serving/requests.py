"""The bodies of requests: their fields, which of them this server refuses, and what they ask of the
sampler.

Types are strict: `seed: false` is no number. A field that is known and not supported is a 400,
unless its value asks for nothing. A field that nobody knows is ignored, as vLLM ignores it, and is
named in the log line of the request.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, SkipValidation

from pdjax.core.guide import Guide
from pdjax.core.request import MAX_PRIORITY, Request, SamplingParams
from pdjax.core.slo import SLO
from pdjax.serving.errors import bad_value, not_supported, of_submit
from pdjax.serving.guides import GuidedRequest, of_format
from pdjax.serving.tool_choice import ToolChoice, tool_choice_of

REFUSED: dict[str, tuple[Any, ...]] = {
    "guided_decoding_backend": (),
    "kv_transfer_params": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "vllm_xargs": ({},),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "chat_template": (),
    "continue_final_message": (False,),
    "prompt_embeds": (),
    "mm_processor_kwargs": ({},),
    "reasoning_effort": (),
}
"""Fields that are known and not supported, each with the values that ask for nothing."""

HARMLESS = frozenset(
    (
        *("store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("verbosity", "prediction", "parallel_tool_calls", "prompt_cache_retention"),
        "include_reasoning",
    )
)
"""Fields of OpenAI's API that do not change what a model answers here; they are ignored."""


class _FirstAlone:
    """Pydantic's `FailFast`, which can't be part of a union since it has no hash."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return {**handler(source), "fail_fast": True}


ItemT = TypeVar("ItemT")
Many = Annotated[list[ItemT], _FirstAlone()]
"""A list of which the first wrong item is told, and no more: a body has room for millions."""


class StreamOptions(BaseModel):
    """`stream_options`: usage in a last chunk, or in every chunk."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Slo(BaseModel):
    """`slo`: latencies that are wanted, seconds."""

    model_config = ConfigDict(strict=True, extra="forbid")

    ttft: float | None = None
    tpot: float | None = None


class SampledRequest(GuidedRequest):
    """What all that ask for tokens have in common; None everywhere is "not given".

    Attributes:
      refused, harmless: of this kind of request, as `REFUSED` and `HARMLESS`.
    """

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = REFUSED
    harmless: ClassVar[frozenset[str]] = HARMLESS

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | Many[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Many[int] | None = None
    allowed_token_ids: Many[int] | None = None
    priority: int | None = None
    deadline: float | None = None
    slo: Slo | None = None
    cache_salt: str | None = None
    cache_pin: float | None = None

    def wishes(self) -> dict[str, Any]:
        """What policies may go by, who shares cached prefixes, and which are kept, as fields of
        `Ask`.

        Raises:
          ApiError: a 400 with the field that is out of range.
        """
        if abs(self.priority or 0) > MAX_PRIORITY:  # else one client overtakes all others for ever
            allowed = f"must be an integer in [-{MAX_PRIORITY}, {MAX_PRIORITY}]"
            raise bad_value("priority", self.priority, allowed)
        slo = {} if self.slo is None else self.slo.model_dump(exclude_none=True)
        wishes: dict[str, Any] = {"priority": self.priority or 0, "deadline": self.deadline}
        wishes |= {"cache_salt": self.cache_salt, "cache_pin": self.cache_pin}
        try:
            made = SLO(**slo) if slo else None
            Request("", (), SamplingParams(), 0.0, slo=made, **wishes)  # its bounds
        except ValueError as error:
            raise of_submit(error) from error
        return {**wishes, "slo": made}

    def unknown_fields(self) -> list[str]:
        """The fields that are ignored since nobody knows them.

        Raises:
          ApiError: a field that is known and not supported asks for something.
        """
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if name in self.refused:
                if value is not None and not _is_among(value, self.refused[name]):
                    raise not_supported(name)
            elif name not in self.harmless:
                unknown.append(name)
        return unknown

    def sampling_params(self, **given: Any) -> SamplingParams:
        """How the tokens are chosen; `given` are params that the kinds read differently.

        Raises:
          ApiError: a 400 with the field that is out of range.
        """
        asked = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop,
            "seed": None if self.seed is None else self.seed % 2**64,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # vLLM's word for all
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "ignore_eos": self.ignore_eos,
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or None,
            **self.bounds(),
            **given,
        }
        plain = {name: value for name, value in asked.items() if value is not None}
        plain.setdefault("max_tokens", None)
        try:
            return SamplingParams(**plain)
        except ValueError as error:
            raise of_submit(error) from error


class ChunkedRequest(SampledRequest):
    """What completions and chats have in common."""

    n: int | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: int | None = None
    response_format: dict[str, Any] | None = None

    def guides(self) -> Iterator[Guide]:
        yield from super().guides()
        yield from of_format("response_format", self.response_format, "json_schema")

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.has_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def sampling_params(self, **given: Any) -> SamplingParams:
        """How the tokens are chosen.

        Raises:
          ApiError: a 400, also for options of a stream where there is none.
        """
        if self.stream_options is not None and not self.stream:
            raise bad_value(
                "stream_options", self.stream_options.model_dump(), "only allowed with stream=true"
            )
        top = self.prompt_logprobs
        if top is not None and (top < 0 or self.stream):
            allowed = "must be 0 or more" if top < 0 else "not allowed with stream=true"
            raise bad_value("prompt_logprobs", top, allowed)
        asked = {"n": self.n, "prompt_logprobs": top, **given}
        return super().sampling_params(**asked)


class CompletionRequest(ChunkedRequest):
    """The body of `/v1/completions`."""

    prompt: SkipValidation[str | list[str] | list[int] | list[list[int]]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    def params(self) -> SamplingParams:
        """How to answer; without `max_tokens` 16 tokens, as OpenAI's API.

        Raises:
          ApiError: a 400.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise not_supported("best_of", f"best_of={self.best_of}: must be n; leave it out")
        most = 16 if self.max_tokens is None else self.max_tokens
        of_prompt = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return self.sampling_params(
            max_tokens=1 if self.is_prompt_alone else most,
            logprobs=self.logprobs,
            prompt_logprobs=max((top for top in of_prompt if top is not None), default=None),
        )

    @property
    def is_prompt_alone(self) -> bool:
        """Whether the prompt is repeated and nothing after it; a model generates a token all the
        same."""
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self, most: int) -> list[str | list[int]]:
        """The prompts, each text or token ids.

        Raises:
          ApiError: a 400: it is none of the four forms, or there are more than `most`.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if _are(int, prompt):
                return [prompt]
            if isinstance(prompt[0], str | list) and len(prompt) > most:  # before each is looked at
                raise bad_value("prompt", f"{len(prompt)} prompts", f"must be at most {most}")
            if _are(str, prompt) or all(
                isinstance(each, list) and each and _are(int, each) for each in prompt
            ):
                return list(prompt)
        raise bad_value(
            "prompt", prompt, "must be text, a list of texts, token ids, or a list of token ids"
        )


class ChatRequest(ChunkedRequest):
    """The body of `/v1/chat/completions`."""

    messages: Many[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Many[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    documents: Many[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None

    @property
    def called(self) -> dict[str, str]:
        """What fields of the core are called here."""
        bound = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {"max_tokens": bound, "logprobs": "top_logprobs"}

    def params(self) -> SamplingParams:
        """How to answer; without a bound, to the end of the context.

        Raises:
          ApiError: a 400.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_value("top_logprobs", self.top_logprobs, "only allowed with logprobs=true")
        most = self.max_completion_tokens
        most = self.max_tokens if most is None else most
        top = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(max_tokens=most, logprobs=top)

    def choice(self) -> ToolChoice:
        """Which tools may be called, and whether one must be.

        Raises:
          ApiError: a 400.
        """
        return tool_choice_of(self.tools, self.tool_choice)


class TokenizeRequest(BaseModel):
    """The body of `/tokenize`: a text, or a conversation."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: Many[dict[str, Any]] | None = None
    tools: Many[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """The body of `/detokenize`."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    tokens: SkipValidation[list[int]]


def checked_ids(name: str, ids: Any, vocab_size: int) -> list[int]:
    """Token ids that a tokenizer knows.

    Raises:
      ApiError: a 400.
    """
    if not isinstance(ids, list) or not _are(int, ids):
        raise bad_value(name, ids, "must be a list of token ids")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise bad_value(name, token, f"token ids are 0 to {vocab_size - 1}")
    return ids


def _are(kind: type, values: Iterable[Any]) -> bool:
    """Whether all are of a type, and no bool passes as a number."""
    return set(map(type, values)) <= {kind}


def _is_among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed
    )
