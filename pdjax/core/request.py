"""What is asked: SamplingParams and Request, both frozen."""

import itertools
import typing
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pdjax.core.guide import Guide
from pdjax.core.messages import shown
from pdjax.core.numbers import is_int, is_number, plain
from pdjax.core.slo import SLO
from pdjax.core.stop_strings import StopStrings

MAX_STOP_STRINGS = 1024
MAX_STOP_CHARACTERS = 16_384
"""Of all stop strings of a request together: the host needs some 30 ms to prepare so many, and
every running request waits meanwhile."""
MAX_STOP_TOKENS = 4096
MAX_LOGIT_BIAS = 1024
"""Tokens of which a request may change the logit."""
MAX_ALLOWED_TOKENS = 1 << 20
"""Tokens that a request may name as the only ones allowed."""
MAX_PRIORITY = 100
"""Greatest distance of a priority from 0 that an order counts, and that a server takes."""

MAX_LABELS = 16
MAX_LABEL_NAME = 64
MAX_LABEL_VALUE = 512
"""Labels of a request, and characters of a label's name and value: the bounds of `metadata` in
OpenAI's API."""

MAX_CACHE_SALT = 512
"""Characters of the salt of a request's cached prefixes."""

MAX_CACHE_PIN = 7 * 24 * 3600
"""Seconds that a prompt may be pinned for: a week."""


class QueueFull(RuntimeError):
    """The coordinator's waiting queue is at its bound; try again later."""


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={shown(value)}: {allowed}")


def _as_tuple(values: object, name: str, what: str, most: int) -> tuple:
    """`values`, of which None has none, fixed for good; an endless iterator is read to `most`."""
    if values is None:
        return ()
    _check(isinstance(values, Iterable), name, values, f"must be None or a sequence of {what}")
    fixed = tuple(itertools.islice(typing.cast(Iterable, values), most + 1))
    if len(fixed) > most:
        raise ValueError(f"{name}: more than {most} {what}; must be at most {most}")
    return fixed


_NUMBERS = (
    *("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "logprobs"),
    *("prompt_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "n"),
    "min_tokens",
)
"""Fields of SamplingParams that may be given as scalars of numpy."""
_TOKEN_IDS = ("stop_token_ids", "shown_tokens")
"""Fields of SamplingParams that are lists of token ids."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when to stop.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_k: keep the k most likely tokens (ties of the k-th all stay); 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches p, in (0, 1].
      min_p: drop tokens less likely than min_p times the likeliest, in [0, 1).
      seed: makes the tokens a function of (seed, choice, position) alone; None draws a seed for the
        request.
      max_tokens: most tokens to generate; None goes on to the end of the context.
      stop: string or strings that end the text; they are not part of it. None is taken as (). At
        most 1,024 strings, of at most 16,384 characters together.
      stop_token_ids: tokens that end it besides the model's own end tokens, at most 4,096. None is
        taken as ().
      shown_tokens: control tokens whose texts are part of the text, for those who read calls of
        tools from it; other control tokens have no text. At most 4,096. None is taken as ().
      ignore_eos: go on past the model's end tokens.
      logprobs: report the chosen token's log-probability and the n likeliest; None reports none.
        They are of the model's own distribution, before penalties and temperature.
      prompt_logprobs: report the same of each token of the prompt but the first, once for all
        choices. The prompt is computed whole then, also where the prefix cache has a part of it.
      presence_penalty: subtracted once from the logit of a token generated before.
      frequency_penalty: subtracted for each time that a token was generated before.
      repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt
        or output (Keskar et al. 2019); 1 changes nothing.
      n: choices to generate from the prompt.
      guide: the form that the text must have; generation ends when it is complete. None is any.
      logit_bias: added to logits by token id, in [-100, 100], after penalties and before
        temperature; at most 1,024 tokens. None is taken as {}. Not to be changed.
      allowed_token_ids: the only tokens that are chosen, end tokens included; None allows all.
      min_tokens: tokens before which neither the model's end tokens nor `stop_token_ids` come.

    Raises:
      ValueError: a value of another type or out of range, or two that contradict each other.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: str | Seq[str] = ()
    stop_token_ids: Seq[int] = ()
    shown_tokens: Seq[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    guide: Guide | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: Seq[int] | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            object.__setattr__(self, name, plain(getattr(self, name)))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _as_tuple(stop, "stop", "strings", MAX_STOP_STRINGS))
        for name in _TOKEN_IDS:
            tokens = _as_tuple(getattr(self, name), name, "token ids", MAX_STOP_TOKENS)
            object.__setattr__(self, name, tuple(map(plain, tokens)))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = _as_tuple(
                self.allowed_token_ids, "allowed_token_ids", "token ids", MAX_ALLOWED_TOKENS
            )
            object.__setattr__(self, "allowed_token_ids", tuple(map(plain, allowed)))
        self._check_ranges()
        self._check_stops()
        self._check_masks()
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={shown(self.n)} with temperature=0: greedy choices would all be the same; "
                "ask for n=1"
            )

    def _check_ranges(self) -> None:
        t, k, p, m = self.temperature, self.top_k, self.top_p, self.min_p
        _check(is_number(t) and t >= 0, "temperature", t, "must be a finite number, 0 or more")
        _check(is_int(k) and k >= 0, "top_k", k, "must be an integer, 0 (all) or more")
        _check(is_number(p) and 0 < p <= 1, "top_p", p, "must be in (0, 1]")
        _check(is_number(m) and 0 <= m < 1, "min_p", m, "must be in [0, 1)")
        seed, most, n = self.seed, self.max_tokens, self.n
        _check(
            seed is None or (is_int(seed) and 0 <= seed < 2**64),
            "seed",
            seed,
            "must be None or in [0, 2**64)",
        )
        _check(
            most is None or (is_int(most) and most >= 1),
            "max_tokens",
            most,
            "must be None or at least 1",
        )
        _check(is_int(n) and n >= 1, "n", n, "must be an integer, at least 1")
        for name in ("logprobs", "prompt_logprobs"):
            top = getattr(self, name)
            _check(
                top is None or (is_int(top) and top >= 0),
                name,
                top,
                "must be None or an integer, 0 or more",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(is_number(value) and -2 <= value <= 2, name, value, "must be in [-2, 2]")
        r = self.repetition_penalty
        _check(is_number(r) and 0 < r <= 100, "repetition_penalty", r, "must be in (0, 100]")

    def _check_stops(self) -> None:
        on = self.ignore_eos
        _check(isinstance(on, bool), "ignore_eos", on, "must be True or False")
        for text in self.stop:
            _check(isinstance(text, str) and text != "", "stop", text, "must be non-empty strings")
        characters = sum(map(len, self.stop))
        if characters > MAX_STOP_CHARACTERS:
            raise ValueError(
                f"stop: {characters} characters in {len(self.stop)} strings; must be at most "
                f"{MAX_STOP_CHARACTERS} together"
            )
        for name in _TOKEN_IDS:
            for token in getattr(self, name):
                _check(is_int(token) and token >= 0, name, token, "must be token ids, 0 or more")

    def _check_masks(self) -> None:
        guide, allowed, least = self.guide, self.allowed_token_ids, self.min_tokens
        _check(guide is None or isinstance(guide, Guide), "guide", guide, "must be None or a Guide")
        if allowed is not None:
            _check(bool(allowed), "allowed_token_ids", allowed, "must be None or not empty")
            for token in allowed:
                _check(
                    is_int(token) and token >= 0,
                    "allowed_token_ids",
                    token,
                    "must be token ids, 0 or more",
                )
        _check(is_int(least) and least >= 0, "min_tokens", least, "must be an integer, 0 or more")
        if self.max_tokens is not None and least > self.max_tokens:
            raise ValueError(
                f"min_tokens={shown(least)}: must be at most max_tokens={shown(self.max_tokens)}"
            )

    @cached_property
    def stop_strings(self) -> StopStrings:
        """`stop`, ready to be searched for; made once for all choices."""
        return StopStrings(typing.cast(Iterable[str], self.stop))

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """`stop_token_ids`, ready to be looked up."""
        return frozenset(self.stop_token_ids)

    @property
    def constrained(self) -> bool:
        """Whether some tokens may not be chosen, at least in the beginning."""
        return self.guide is not None or self.allowed_token_ids is not None or self.min_tokens > 0

    @property
    def penalized(self) -> bool:
        """Whether the choice of a token depends on the tokens before it, beyond the logits."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )


def _bias(biases: object) -> dict[int, float]:
    """A copy of what may be the biases of a request; None has none."""
    if biases is None:
        return {}
    _check(isinstance(biases, Mapping), "logit_bias", biases, "must be a dict of numbers by id")
    given = typing.cast(Mapping[Any, Any], biases)
    if len(given) > MAX_LOGIT_BIAS:
        raise ValueError(f"logit_bias: {len(given)} tokens; must be at most {MAX_LOGIT_BIAS}")
    found = {plain(token): plain(bias) for token, bias in given.items()}
    for token, bias in found.items():
        _check(
            is_int(token) and token >= 0, "logit_bias", token, "keys must be token ids, 0 or more"
        )
        _check(
            is_number(bias) and -100 <= bias <= 100,
            f"logit_bias[{token}]",
            bias,
            "must be a number in [-100, 100]",
        )
    return found


@dataclass(frozen=True)
class Request:
    """One question, as it was asked.

    Attributes:
      id: unique among live requests.
      prompt_token_ids: at least one.
      params: how to answer.
      arrival: moment of arrival on the coordinator's clock, seconds.
      priority: the lower, the earlier, as in vLLM; for policies that go by it. The order "priority"
        takes one beyond -100 or 100 for these.
      deadline: seconds after `arrival` within which the whole answer is wanted; None has no such
        wish. It is for policies that go by it; a request that has begun is not ended for it.
      labels: what else is known of the request, such as its tenant, for policies and observers; at
        most 16, of at most 64 characters with values of at most 512. Not to be changed.
      slo: latencies that are wanted, for policies that go by them: `ttft` and `tpot`.
      cache_salt: cached prefixes are shared only with requests of the same salt, so that nobody
        else learns from the time to a first token what a prompt begins with; 1 to 512 characters.
        None shares with those that have none.
      cache_pin: seconds for which no whole page of the prompt is evicted where it is prefilled,
        from when it is computed; a later request with the same prompt says it anew, and 0 lets go
        of it wherever it is pinned. At most a week; None pins nothing. Where too much is pinned
        already, the prompt is not.

    Raises:
      ValueError: a priority, deadline, SLO, label, salt or pin of another type or beyond its bound.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival: float
    priority: int = 0
    deadline: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    slo: SLO | None = None
    cache_salt: str | None = None
    cache_pin: float | None = None

    def __post_init__(self) -> None:
        for name in ("priority", "deadline", "cache_pin"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        priority, seconds = self.priority, self.deadline
        _check(
            is_int(priority) and abs(priority) < 2**63,
            "priority",
            priority,
            "must be an integer in (-2**63, 2**63)",
        )
        _check(
            seconds is None or (is_number(seconds) and seconds > 0),
            "deadline",
            seconds,
            "must be None or a positive number of seconds after arrival",
        )
        _check(
            self.slo is None or isinstance(self.slo, SLO), "slo", self.slo, "must be None or an SLO"
        )
        object.__setattr__(self, "labels", _labels(self.labels))
        salt = self.cache_salt
        _check(
            salt is None or (isinstance(salt, str) and 0 < len(salt) <= MAX_CACHE_SALT),
            "cache_salt",
            salt,
            f"must be None or a string of 1 to {MAX_CACHE_SALT} characters",
        )
        pin = self.cache_pin
        _check(
            pin is None or (is_number(pin) and 0 <= pin <= MAX_CACHE_PIN),
            "cache_pin",
            pin,
            f"must be None or a number of seconds from 0 to {MAX_CACHE_PIN}",
        )


def _labels(labels: object) -> dict[str, str]:
    """A copy of what may be the labels of a request; None has none."""
    if labels is None:
        return {}
    _check(isinstance(labels, Mapping), "labels", labels, "must be a dict of strings")
    found = dict(typing.cast(Mapping[str, str], labels))
    if len(found) > MAX_LABELS:
        raise ValueError(f"labels: {len(found)} labels; must be at most {MAX_LABELS}")
    for name, value in found.items():
        _check(
            isinstance(name, str) and 0 < len(name) <= MAX_LABEL_NAME,
            "labels",
            name,
            f"names must be strings of 1 to {MAX_LABEL_NAME} characters",
        )
        _check(
            isinstance(value, str) and len(value) <= MAX_LABEL_VALUE,
            f"labels[{shown(name)}]",
            value,
            f"must be a string of at most {MAX_LABEL_VALUE} characters",
        )
    return found
