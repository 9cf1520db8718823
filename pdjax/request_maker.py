"""What a caller asks, as requests: prompts or conversations, with params and options."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import fields
from typing import Any, NamedTuple, TypedDict, cast

from pdjax.core.clock import Clock
from pdjax.core.request import Request, SamplingParams
from pdjax.core.slo import SLO
from pdjax.text.guides import GuideCompiler, TokenGuide
from pdjax.text.prompts import Prompt, each_conversation, each_prompt, params_of_each, token_ids_of
from pdjax.text.text_stream import TextStream
from pdjax.text.tokenizer import Message, Tokenizer


class RequestOptions(TypedDict, total=False):
    """What policies may go by, who shares cached prefixes, and which are kept; see `Request` in
    pdjax/core/request.py."""

    priority: int
    deadline: float | None
    labels: Mapping[str, str] | None
    slo: SLO | None
    cache_salt: str | None
    cache_pin: float | None


class ChatOptions(RequestOptions, total=False):
    """What policies may go by, and how a conversation becomes a prompt; see
    `Tokenizer.apply_chat_template`."""

    tools: Iterable[Any] | None
    documents: Iterable[Any] | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None


_OF_PARAMS = frozenset(field.name for field in fields(SamplingParams))


def _check_options(options: Mapping[str, Any], known: type) -> None:
    """Refuse an option that is none, as Python refuses an argument.

    Raises:
      TypeError: says where it belongs, or what the options are.
    """
    for name in options:
        if name in _OF_PARAMS:
            raise TypeError(f"{name}: is given as SamplingParams({name}=...)")
        if name not in known.__annotations__:
            allowed = ", ".join(known.__annotations__)
            raise TypeError(f"{name}: no such option; allowed are {allowed}")


_OF_TEMPLATE = ("tools", "documents", "chat_template", "chat_template_kwargs")


class Asked(NamedTuple):
    """A request, and its prompt where that was text."""

    request: Request
    text: str | None


class RequestMaker:
    """Makes requests, each with an id of its own.

    Args:
      source: name of the model, for messages.
      tokenizer: turns text into token ids; None where the model has none.
      clock: dates a request's arrival.
      guides: compiles guides, in the thread that asks; None where the model has no tokenizer.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer | None,
        clock: Clock,
        guides: GuideCompiler | None = None,
    ) -> None:
        self.tokenizer, self._guides = tokenizer, guides
        self._source, self._clock = source, clock
        self._ids = itertools.count(1)

    def of_prompt(
        self, prompt: Prompt, params: SamplingParams | None, options: RequestOptions
    ) -> Asked:
        """The request for one prompt; params of None are the defaults.

        Raises:
          ValueError: a prompt, params or options that no model could be asked with.
        """
        params = self._checked(params, options)
        text = prompt if isinstance(prompt, str) else None
        if text == "":
            raise ValueError("prompt='': must not be empty")
        if text is not None:
            ids = self._need_tokenizer("prompt").encode(text)
        else:
            ids = token_ids_of(prompt)
        return Asked(self._request(tuple(ids), params, options), text)

    def of_ids(
        self, token_ids: tuple[int, ...], params: SamplingParams, options: RequestOptions
    ) -> Request:
        """The request for a prompt that is known to be integers.

        Raises:
          ValueError: params or options that no model could be asked with.
        """
        return self._request(token_ids, self._checked(params, options), options)

    def _checked(self, params: SamplingParams | None, options: RequestOptions) -> SamplingParams:
        _check_options(options, RequestOptions)
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params={params!r}: must be a SamplingParams")
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop={params.stop}: the model has no tokenizer, so there is no text")
        if params.guide is not None:
            if self._guides is None:
                raise ValueError(
                    f"{params.guide.name}: the model has no tokenizer, so there is no text"
                )
            self._guides.check(params.guide)
        return params

    def _request(
        self, token_ids: tuple[int, ...], params: SamplingParams, options: RequestOptions
    ) -> Request:
        asked: dict[str, Any] = {**options}  # labels of None are none
        return Request(f"r{next(self._ids)}", token_ids, params, self._clock.now(), **asked)

    def of_prompts(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None,
        options: RequestOptions,
    ) -> list[Asked]:
        """The requests for one prompt or several, with params for all or for each of them.

        Raises:
          ValueError: as for one prompt, or numbers of prompts and params that differ.
        """
        several = each_prompt(prompts)
        one = params is None or isinstance(params, SamplingParams)
        each = [params] * len(several) if one else params_of_each(params)
        if len(each) != len(several):
            raise ValueError(
                f"params: {len(each)} given for {len(several)} prompts; must be one, or one each"
            )
        return [
            self.of_prompt(prompt, its, options) for prompt, its in zip(several, each, strict=True)
        ]

    def of_conversations(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        params: SamplingParams | Seq[SamplingParams] | None,
        options: ChatOptions,
    ) -> list[Asked]:
        """The requests for one conversation or several.

        Raises:
          ValueError: as for prompts; the model has no chat template, or that refuses the messages.
        """
        prompts, rest = self._rendered(messages, options)
        return self.of_prompts(prompts, params, rest)

    def of_conversation(
        self, messages: Iterable[Message], params: SamplingParams | None, options: ChatOptions
    ) -> Asked:
        """The request for one conversation.

        Raises:
          ValueError: as for several; these are several.
        """
        prompts, rest = self._rendered(messages, options)
        if len(prompts) != 1:
            raise ValueError(f"messages: {len(prompts)} conversations; a stream answers one")
        return self.of_prompt(prompts[0], params, rest)

    def _rendered(
        self, messages: Any, options: ChatOptions
    ) -> tuple[list[list[int]], RequestOptions]:
        """The token ids of each conversation, and the options that are not about them."""
        _check_options(options, ChatOptions)
        tokenizer = self._need_tokenizer("chat")
        given: dict[str, Any] = {**options}
        template = {name: given.pop(name, None) for name in _OF_TEMPLATE}
        for name in ("tools", "documents"):  # an iterator is read once, for all conversations
            if template[name] is not None:
                template[name] = list(template[name])
        conversations = each_conversation(messages)
        rest = cast(RequestOptions, given)
        return [tokenizer.apply_chat_template(each, **template) for each in conversations], rest

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{what}: model.source={self._source!r} has no tokenizer; give token ids"
            )
        return self.tokenizer


def text_maker(tokenizer: Tokenizer | None) -> Callable[[Request], TextStream] | None:
    """What makes the text of a choice of a request, still empty; None without a tokenizer."""
    if tokenizer is None:
        return None

    def make(request: Request) -> TextStream:
        return new_text(tokenizer, request.prompt_token_ids, request.params)

    return make


def new_text(
    tokenizer: Tokenizer, prompt_token_ids: Seq[int], params: SamplingParams
) -> TextStream:
    """The text of a choice, still empty."""
    decoder = tokenizer.incremental_decoder(after=prompt_token_ids, shown=params.shown_tokens)
    return TextStream(decoder, params.stop_strings)


def guide_maker(guides: GuideCompiler | None) -> Callable[[Request], TokenGuide | None] | None:
    """What follows the form of a choice of a request, from its beginning; None without a
    tokenizer."""
    if guides is None:
        return None

    def make(request: Request) -> TokenGuide | None:
        guide = request.params.guide
        return None if guide is None else guides.start(guide)

    return make
