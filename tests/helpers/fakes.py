"""Engines whose answers can be worked out by hand, for tests of the host column.

A fake pool keeps one number per layer and KV address: the token that was written there, salted with
the layer. The next token is a pure function of what is read back *through the page table*, of the
position, and of how it is to be sampled; `expected_output` works out the same without any pool. So
a page that is shared by mistake, freed too early or never filled, a stale row, or a wrong position,
all come out as wrong tokens.

The fakes are as unkind as the contract in `interfaces` allows: tickets become ready when they like,
and idle rows scribble on the null page.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.core.request import SamplingParams
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.batches import (
    NO_TOKEN,
    NOT_FINITE,
    Masks,
    Sampled,
    SamplingBatch,
    Scores,
)
from pdjax.interfaces.steps import Copies
from pdjax.interfaces.transport import TransferTicket
from tests.helpers.fake_guides import END_TOKEN, VOCAB, constraint_of

POISON = VOCAB
"""A token of whose KV no finite logit can be computed."""
_POISONED = 10**12
DELETED = -(10**9)
"""What is read of a pool that was given away: it makes every token wrong."""
TOP_LOGPROBS = 3
STOP = "enough"

ResultT = TypeVar("ResultT")


class InjectedError(Exception):
    """A fault that a test has asked for."""


class InjectedInterrupt(BaseException):
    """A Ctrl-C that a test has asked for."""


class Chance:
    """Randomness of the fakes: delays, and faults with probability `fault_rate` a call, of which
    a quarter are interrupts."""

    def __init__(self, seed: int, fault_rate: float = 0.0, max_delay: int = 3) -> None:
        self.random = random.Random(seed)
        self.fault_rate = fault_rate
        self.max_delay = max_delay
        self.faults = 0

    def delay(self) -> int:
        """How many times a ticket has to be asked."""
        return self.random.randint(0, self.max_delay)

    def maybe_fail(self, where: str) -> None:
        """Raise, now and then."""
        if self.fault_rate and self.random.random() < self.fault_rate:
            self.faults += 1
            raise (InjectedInterrupt if self.random.random() < 0.25 else InjectedError)(where)

    def garbage(self) -> int:
        """A token that means nothing."""
        return self.random.randrange(VOCAB)


class FakeTicket(Generic[ResultT]):
    """Ready after having been asked a few times; may then turn out to have failed."""

    def __init__(self, result: ResultT, chance: Chance) -> None:
        self._result = result
        self._chance = chance
        self._asks_left = chance.delay()
        self._error: BaseException | None = None
        try:
            chance.maybe_fail("ticket")
        except (InjectedError, InjectedInterrupt) as error:
            self._error = error

    def ready(self) -> bool:
        self._asks_left -= 1
        return self._asks_left < 0

    def result(self) -> ResultT:
        if self._error is not None:
            raise self._error
        return self._result


class FakeStepTicket(FakeTicket[Sampled]):
    """The ticket of a step; `exports` are those of the transfers that left with it."""

    def __init__(
        self, result: Sampled, chance: Chance, exports: Mapping[int, TransferTicket] | None = None
    ) -> None:
        super().__init__(result, chance)
        self.exports = dict(exports or {})
        self.made, self.chosen = True, result.tokens


@dataclass
class FakeText:
    """Text that is stopped after so many tokens, or breaks."""

    stop_after: int | None
    break_after: int | None
    pushed: int = 0
    finished: bool = False
    text: str = ""

    def take(self) -> str:
        return ""

    def push(self, token_id: int) -> str | None:
        assert not self.finished
        self.pushed += 1
        if self.pushed == self.break_after:
            raise InjectedError("text")
        return STOP if self.pushed == self.stop_after else None

    def finish(self) -> None:
        self.finished = True


class FakePool:
    """What was written, by layer and address; `contents[l, page * page_size + offset]`.

    As a device's, it is donated to whatever writes it: what was given away cannot be read, and what
    fails after that has lost all of it.
    """

    def __init__(self, name: PoolId, layout: KVLayout, num_pages: int) -> None:
        self.id, self.num_pages = name, num_pages
        self.layout = layout
        self.contents = np.zeros((layout.num_layers, num_pages * layout.page_size), np.int64)
        self.losses = 0

    @contextmanager
    def donated(self, chance: Chance) -> Iterator[None]:
        """A block that writes the pool, and may then fail."""
        given, self.contents = self.contents, self.contents.copy()
        given[:] = DELETED
        try:
            yield
            chance.maybe_fail("after donation")
        except BaseException:
            self.contents[:] = DELETED
            self.contents = np.zeros_like(given)
            self.losses += 1
            raise

    def write(self, layers: tuple[int, ...], slot: int, token: int) -> None:
        for layer in layers:
            self.contents[layer, slot] = salted(layer, token)

    def copy(self, copies: Copies) -> None:
        """Copy pages: all are read before any is written."""
        size = self.layout.page_size
        assert len({target for _, target in copies}) == len(copies), "a page is copied to twice"
        pages = self.contents.reshape(self.layout.num_layers, -1, size)
        found = [pages[:, source].copy() for source, _ in copies]
        for (_, target), content in zip(copies, found, strict=True):
            pages[:, target] = content

    def read(self, layers: tuple[int, ...], pages: np.ndarray, length: int) -> int:
        """Digest of the first `length` tokens of a sequence in these layers."""
        size = self.layout.page_size
        positions = np.arange(length)
        slots = pages[positions // size].astype(np.int64) * size + positions % size
        seen = self.contents[layers[0] : layers[-1] + 1, slots]
        weights = np.arange(layers[0] + 1, layers[-1] + 2)[:, None] * (positions + 1)
        return int((seen * weights).sum())


def salted(layer: int, token: int) -> int:
    """What layer `layer` keeps of a token."""
    return _POISONED if token == POISON else token + 101 * layer + 1


def digest(tokens: list[int], layers: int) -> int:
    """What all layers together read back of a context."""
    return sum(
        (layer + 1) * (position + 1) * salted(layer, token)
        for layer in range(layers)
        for position, token in enumerate(tokens)
    )


def said(tokens: list[int], prompt_len: int) -> int:
    """What a penalty sees of a history: which tokens, and which of them were prompt."""
    return sum(token * (3 if i < prompt_len else 5) * (i + 1) for i, token in enumerate(tokens))


def choose(context: int, length: int, seed: int, temperature: float, history: int) -> int:
    """The token at position `length`, given the digest of those before it."""
    chance = seed if temperature > 0 else 0
    mixed = context * 2654435761 + length * 40503 + chance * 69069 + history * 7919
    return (mixed >> 7) % VOCAB


def allowed_near(token: int, mask: np.ndarray | None) -> int:
    """The first token from `token` on that a mask allows."""
    if mask is None:
        return token
    allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB].astype(bool)
    return (token + int(np.argmax(np.roll(allowed, -token)))) % VOCAB


def bias_of(pairs: Iterable[tuple[int, float]]) -> int:
    """What biases make of the choice of a token, whatever their order."""
    return sum(int(token + 1) * int(value * 8) for token, value in pairs)


def is_penalized(params: SamplingParams | SamplingBatch, row: Any = ...) -> bool:
    values = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1)
    return any(np.asarray(value)[row] != 0 for value in values)


def expected_output(sequence: Sequence, layers: int) -> list[int]:
    """The output of a sequence that has the machine for itself."""
    params, constraint = sequence.request.params, constraint_of(sequence.request)
    tokens = list(sequence.request.prompt_token_ids)
    prompt_len, output = len(tokens), list[int]()
    context, bias = digest(tokens, layers), bias_of(params.logit_bias.items())
    while len(output) < sequence.max_new_tokens and POISON not in tokens:
        history = said(tokens, prompt_len) if is_penalized(params) else 0
        token = choose(context + bias, len(tokens), sequence.seed, params.temperature, history)
        token = allowed_near(token, None if constraint is None else constraint.mask)
        output.append(token)
        if (token == END_TOKEN and not params.ignore_eos) or token in params.stop_token_ids:
            break
        if constraint is not None:
            constraint.advance(token)
            if constraint.complete:
                break
        context += sum(
            (layer + 1) * (len(tokens) + 1) * salted(layer, token) for layer in range(layers)
        )
        tokens.append(token)
    return output


def sampled(tokens: list[int]) -> Sampled:
    """Tokens with log-probabilities that tell whose they are."""
    ids = np.array(tokens, np.int32)
    top_ids = _top_of(ids)
    return Sampled(ids, logprob_of(ids), top_ids, logprob_of(top_ids))


def _top_of(ids: np.ndarray) -> np.ndarray:
    return (ids[:, None] + np.arange(TOP_LOGPROBS, dtype=np.int32)) % VOCAB


def scores(contexts: list[int], targets: np.ndarray) -> Scores:
    """Log-probabilities of tokens of prompts that tell what was read before each."""
    chosen = np.array([scored(*each) for each in zip(contexts, targets.tolist(), strict=True)])
    ids = _top_of(targets)
    return Scores(chosen.astype(np.float32), targets + 1, ids, logprob_of(ids))


def scored(context: int, target: int) -> float:
    """The log-probability of a token of a prompt, given the digest of those before it."""
    return float("nan") if context >= _POISONED else -float((context + 7 * target) % 1009)


def logprob_of(token: Any) -> Any:
    """The log-probability that the fakes give a token."""
    return -np.asarray(token, np.float32) / 8


def sample(
    sampling: SamplingBatch,
    masks: Masks | None,
    entry: int,
    context: int,
    length: int,
    tokens: list[int],
    *,
    row: int | None = None,
) -> int:
    """The token of an entry of a batch, whose row in `sampling` may be another."""
    row = entry if row is None else row
    if context >= _POISONED:
        return NOT_FINITE
    history = said(tokens, int(sampling.prompt_lens[row])) if is_penalized(sampling, row) else 0
    seed, temperature = int(sampling.seed[row]), float(sampling.temperature[row])
    bias = 0
    if sampling.bias is not None and sampling.bias_tokens is not None:
        pairs = zip(sampling.bias_tokens[row].tolist(), sampling.bias[row].tolist(), strict=True)
        bias = bias_of(pair for pair in pairs if pair[0] != NO_TOKEN)
    mask = None
    if masks is not None and entry in masks.rows:
        mask = masks.bits[masks.rows.tolist().index(entry)]
    return allowed_near(choose(context + bias, length, seed, temperature, history), mask)


class UndecidedWrite:
    """The ticket of a write that writes nothing, and fails when a test says so."""

    def __init__(self) -> None:
        self.fails = False

    def ready(self) -> bool:
        return self.fails

    def result(self) -> int:
        raise OSError("the device has gone")
