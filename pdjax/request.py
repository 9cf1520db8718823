"""What is asked (SamplingParams, Request: frozen) and how far it has come (Sequence: running state,
and its legal moves)."""

import enum
import itertools
import math
import sys
import typing
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np

from pdjax.json_file import shown
from pdjax.outputs import TokenLogprobs
from pdjax.stop_strings import StopStrings

MAX_STOP_STRINGS = 1024
MAX_STOP_CHARACTERS = 16_384
"""Of all stop strings of a request together: the host needs some 30 ms to prepare so many, and
every running request waits meanwhile."""
MAX_STOP_TOKENS = 4096


class QueueFull(RuntimeError):
    """The coordinator's waiting queue is at its bound; try again later."""


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={shown(value)}: {allowed}")


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_int(value) and abs(typing.cast(int, value)) <= sys.float_info.max


def _plain(value: Any) -> Any:
    """A scalar of numpy as the number that it is; anything else as it is."""
    if isinstance(value, (bool, np.bool_)) or type(value) in (int, float):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        with suppress(OverflowError):
            return float(value)
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "n"),
)
"""Fields of SamplingParams that may be given as scalars of numpy."""


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
      ignore_eos: go on past the model's end tokens.
      logprobs: report the chosen token's log-probability and the n likeliest; None reports none.
        They are of the model's own distribution, before penalties and temperature.
      presence_penalty: subtracted once from the logit of a token generated before.
      frequency_penalty: subtracted for each time that a token was generated before.
      repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt
        or output (Keskar et al. 2019); 1 changes nothing.
      n: choices to generate from the prompt.

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
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            object.__setattr__(self, name, _plain(getattr(self, name)))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _as_tuple(stop, "stop", "strings", MAX_STOP_STRINGS))
        tokens = _as_tuple(self.stop_token_ids, "stop_token_ids", "token ids", MAX_STOP_TOKENS)
        object.__setattr__(self, "stop_token_ids", tuple(map(_plain, tokens)))
        self._check_ranges()
        self._check_stops()
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={shown(self.n)} with temperature=0: greedy choices would all be the same; "
                "ask for n=1"
            )

    def _check_ranges(self) -> None:
        t, k, p, m = self.temperature, self.top_k, self.top_p, self.min_p
        _check(_is_number(t) and t >= 0, "temperature", t, "must be a finite number, 0 or more")
        _check(_is_int(k) and k >= 0, "top_k", k, "must be an integer, 0 (all) or more")
        _check(_is_number(p) and 0 < p <= 1, "top_p", p, "must be in (0, 1]")
        _check(_is_number(m) and 0 <= m < 1, "min_p", m, "must be in [0, 1)")
        seed, most, n = self.seed, self.max_tokens, self.n
        _check(
            seed is None or (_is_int(seed) and 0 <= seed < 2**64),
            "seed",
            seed,
            "must be None or in [0, 2**64)",
        )
        _check(
            most is None or (_is_int(most) and most >= 1),
            "max_tokens",
            most,
            "must be None or at least 1",
        )
        _check(_is_int(n) and n >= 1, "n", n, "must be an integer, at least 1")
        top = self.logprobs
        _check(
            top is None or (_is_int(top) and top >= 0),
            "logprobs",
            top,
            "must be None or an integer, 0 or more",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(_is_number(value) and -2 <= value <= 2, name, value, "must be in [-2, 2]")
        r = self.repetition_penalty
        _check(_is_number(r) and 0 < r <= 100, "repetition_penalty", r, "must be in (0, 100]")

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
        for token in self.stop_token_ids:
            _check(
                _is_int(token) and token >= 0,
                "stop_token_ids",
                token,
                "must be token ids, 0 or more",
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
    def penalized(self) -> bool:
        """Whether the choice of a token depends on the tokens before it, beyond the logits."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )


@dataclass(frozen=True)
class Request:
    """One question, as it was asked.

    Attributes:
      id: unique among live requests.
      prompt_token_ids: at least one.
      params: how to answer.
      arrival: moment of arrival on the coordinator's clock, seconds.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival: float


class State(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # in the queue, holds nothing
    PREFILLING = "prefilling"  # holds prefill pages; chunks are being dispatched
    PREFILLED = "prefilled"  # first token known; its KV waits for room on the decode side
    TRANSFERRING = "transferring"  # holds a row and pages on both sides
    DECODING = "decoding"  # holds a row and decode pages
    PARKED = "parked"  # its KV lies in a lower tier
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


_ENDS = {State.ABORTED, State.FAILED}

LEGAL_MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.PREFILLING} | _ENDS),
    State.PREFILLING: frozenset({State.PREFILLED, State.FINISHED, State.WAITING} | _ENDS),
    State.PREFILLED: frozenset({State.TRANSFERRING, State.DECODING, State.WAITING} | _ENDS),
    State.TRANSFERRING: frozenset({State.DECODING, State.WAITING} | _ENDS),
    State.DECODING: frozenset(
        {State.FINISHED, State.TRANSFERRING, State.WAITING, State.PARKED} | _ENDS
    ),
    State.PARKED: frozenset({State.TRANSFERRING, State.WAITING} | _ENDS),
    State.FINISHED: frozenset(),
    State.ABORTED: frozenset(),
    State.FAILED: frozenset(),
}
"""The life of a sequence. `WAITING` again is recompute: the KV was given up and its tokens will be
prefilled anew."""


@dataclass(eq=False)
class Sequence:
    """Running state of one choice of a request. Only the coordinator and the schedulers it calls
    change it.

    Attributes:
      request: what was asked; `choice`: which of its n.
      seed: 32-bit seed of this choice; with a token's position it decides that token's chance.
      order: place among all sequences ever submitted; policies that favour the oldest go by it.
      max_new_tokens: most tokens it may generate: `max_tokens`, cut by the context.
      output: generated token ids, harvested.
      logprobs: one entry a token of `output` if they were asked for, else empty.
      state: see State; change it by `move`.
      epoch: counts recomputes; a ticket that names an older epoch speaks of KV that is gone.
      prefilled: tokens whose prefill has been dispatched in this epoch.
      served: number of the step, among those of its prefill engine, that had a chunk of it last.
      pages: physical pages, in order, on the engine that holds the sequence now.
      engine: index of that engine among its kind; `row`: its decode row.
      home: the prefill engine that last had it.
      handoff: its hand-off, while there is one; see host/handoff.py.
      failed_handoffs: those that failed for good, after which it was prefilled anew.
      streams: whether its KV may leave before it has to: while it is prefilled, or for another
        decode engine.
      page_keys: of its whole pages, as far as they have been asked for; see host/prefix.py.
      found: the prefix indices of the pools that it has computed or brought KV in, and how many of
        its first tokens were findable there before; all others are its own.
      cached_tokens: prompt tokens whose KV was reused instead of computed.
      finish_reason: "stop", "length", "abort" or "error"; `stop_reason`: the stop string or token
        id; `error`: why.
      settled: tokens of `output` of which all is known that comes with a token: its
        log-probabilities, its text, that it is not the last. Fewer than `output` has only while
        one is being added, or for ever if the turn was broken off then.
      done: whether it has come to its end: no move leads on from its state.
    """

    request: Request
    choice: int
    seed: int
    order: int = 0
    max_new_tokens: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    state: State = State.WAITING
    epoch: int = 0
    prefilled: int = 0
    served: int = -1
    pages: list[int] = field(default_factory=list)
    engine: int = -1
    row: int = -1
    home: int = -1
    handoff: Any = None
    failed_handoffs: int = 0
    streams: bool = True
    page_keys: dict[int, list[bytes]] = field(default_factory=dict)
    found: dict[Any, int] = field(default_factory=dict)
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    text: Any = None  # a TextStream where text was asked for; see host/text.py
    settled: int = 0
    # Kept, not worked out: it is asked for with every token of everybody.
    done: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.done = not LEGAL_MOVES[self.state]

    @property
    def id(self) -> str:
        """Unique among live sequences."""
        return f"{self.request.id}#{self.choice}"

    def found_in(self, index: Any, tokens: int) -> None:
        """Take down that its first `tokens` tokens are findable in a pool. What it has added there
        itself, before it was preempted, stays its own."""
        self.found[index] = min(tokens, self.found.get(index, tokens))

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def length(self) -> int:
        """Tokens of prompt and harvested output."""
        return self.prompt_len + len(self.output)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and harvested output."""
        return [*self.request.prompt_token_ids, *self.output]

    @property
    def lifetime_tokens(self) -> int:
        """Tokens whose KV it may come to need: all but the last one, which nobody reads."""
        return self.prompt_len + self.max_new_tokens - 1

    def move(self, state: State) -> None:
        """Go on to `state`.

        Raises:
          RuntimeError: the life of a sequence has no such move.
        """
        if state not in LEGAL_MOVES[self.state]:
            raise RuntimeError(
                f"sequence {self.id}: no move from {self.state.name} to {state.name}"
            )
        self.state = state
        self.done = not LEGAL_MOVES[state]

    def start_over(self) -> None:
        """Go back to the queue from any live state, holding nothing. Its KV is given up, and what
        has been dispatched for it so far is nobody's."""
        assert not self.done, f"sequence {self.id} has ended"
        self.state = State.WAITING
        self.epoch += 1
        self.prefilled = 0
        self.pages, self.engine, self.row, self.handoff = [], -1, -1, None
