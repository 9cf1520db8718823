"""How far one choice of a request has come (Sequence: running state), and its legal moves."""

import enum
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pdjax.core.ids import EngineId, PoolId
from pdjax.core.logprobs import TokenLogprobs
from pdjax.core.request import Request
from pdjax.host.sequences.constraint import Constraint
from pdjax.host.sequences.prompt_scores import PromptScores


class State(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # in the queue, holds nothing
    LOADING = "loading"  # between two waits: a prefix comes up from a tier to where it is prefilled
    PREFILLING = "prefilling"  # holds prefill pages; chunks are being dispatched
    PREFILLED = "prefilled"  # first token known; its KV waits for room on the decode side
    TRANSFERRING = "transferring"  # holds a row and pages on both sides
    DECODING = "decoding"  # holds a row and decode pages
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"
    SHED = "shed"  # refused by the admission policy, before anything was done for it


_ENDS = {State.FINISHED, State.ABORTED, State.FAILED}

LEGAL_MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.LOADING, State.PREFILLING, State.SHED} | _ENDS),
    State.LOADING: frozenset({State.WAITING} | _ENDS),
    State.PREFILLING: frozenset({State.PREFILLED, State.WAITING} | _ENDS),
    State.PREFILLED: frozenset({State.TRANSFERRING, State.DECODING, State.WAITING} | _ENDS),
    State.TRANSFERRING: frozenset({State.DECODING, State.WAITING} | _ENDS),
    State.DECODING: frozenset({State.TRANSFERRING, State.WAITING} | _ENDS),
    State.FINISHED: frozenset(),
    State.ABORTED: frozenset(),
    State.FAILED: frozenset(),
    State.SHED: frozenset(),
}
"""The life of a sequence. `WAITING` again is recompute: the KV was given up, and its tokens will be
prefilled once more. A sequence may finish anywhere: whoever makes its text may find a stop string
late."""


class SequenceText(Protocol):
    """The text of a sequence, as `text/text_stream.py` makes it."""

    @property
    def text(self) -> str:
        """All of it so far."""
        ...

    def push(self, token_id: int) -> str | None:
        """Add a token; returns the stop string that it completes, if it does."""
        ...

    def take(self) -> str:
        """What is certain and has not been taken."""
        ...

    def finish(self) -> None:
        """No token follows."""
        ...


# In slots, since a few of its many fields are looked up with every token.
@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """Running state of one choice of a request. The coordinator alone changes it; policies read it.

    Attributes:
      request: what was asked; `choice`: which of its n.
      seed: 32-bit seed of this choice; with a token's position it decides that token's chance.
      order: place among all sequences ever submitted; policies that favour the oldest go by it.
      max_new_tokens: most tokens that it may generate: `max_tokens`, cut by the context.
      output: generated token ids, harvested.
      logprobs: one entry a token of `output` if they were asked for, else empty.
      state: see State; `move` changes it.
      epoch: counts recomputes; a ticket of an older epoch is about KV that has been given up.
      prefilled: tokens whose prefill has been dispatched in this epoch.
      served: number of the step, among those of its prefill engine, that last had a chunk of it.
      pages: physical pages, in order, of the pool that holds its KV now.
      engine: the engine that it is on; None while it waits or moves. `row`: its decode row.
      pool: the pool of `pages`; None while it holds none.
      home: the engine that prefilled it last.
      handoff: its hand-off, while there is one; see host/handoff/handoff.py. Of a LOADING sequence
        the load that it waits for; see host/tiers/load.py.
      brought_to: the pool that a prefix of it was last brought up to from a tier; None before.
      failed_handoffs: hand-offs that failed for good, after which it was prefilled again;
        `failed_steps`: steps that failed, likewise; `failed_on`: the engines of those.
      streams: whether its KV may leave before it has to: while it is prefilled, or for another
        decode engine.
      page_keys: keys of its whole pages by page size, as far as they have been asked for; see
        host/kv/prefix_index.py.
      copied: a page of its pool that begins with tokens of its own and is copied before its first
        chunk is computed; None where there is none, or the step has been dispatched.
      copied_from: that page, from then on until the step has been seen to end.
      found: the prefix indices of the pools in which its KV was computed or brought, and how many
        of its first tokens were findable there before; all others are its own.
      cached_tokens: prompt tokens whose KV was reused instead of computed.
      finish_reason: "stop", "length", "abort", "error" or "shed"; `stop_reason`: the stop string or
        token id; `error`: why it failed, or was shed.
      prompt_scores: the log-probabilities of its prompt, where it is to bring them.
      text: its text, where text was asked for.
      constraint: the tokens that it may choose next; None where it may choose any.
      settled: tokens of `output` that are complete: with their log-probabilities and text, and
        known not to be the last. Fewer than `output` has only while a token is being added, or for
        good if the turn was broken off then.
      done: whether it has come to its end: no move leads on from its state.
      id: unique among live sequences.
      prompt_len: tokens of its prompt.
      stop_token_ids, wanted_logprobs: what its request says of tokens that end it, and of
        log-probabilities.
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
    engine: EngineId | None = None
    row: int = -1
    pool: PoolId | None = None
    home: EngineId | None = None
    handoff: Any = None
    brought_to: PoolId | None = None
    failed_handoffs: int = 0
    failed_steps: int = 0
    failed_on: frozenset[EngineId] = frozenset()
    streams: bool = True
    page_keys: dict[int, list[bytes]] = field(default_factory=dict)
    copied: int | None = None
    copied_from: int | None = None
    found: dict[Any, int] = field(default_factory=dict)
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    prompt_scores: PromptScores | None = None
    text: SequenceText | None = None
    constraint: Constraint | None = None
    settled: int = 0
    # Kept, not worked out: they are asked for with every step, most of them with every token.
    done: bool = field(default=False, init=False)
    id: str = field(init=False)
    prompt_len: int = field(init=False)
    stop_token_ids: frozenset[int] = field(init=False)
    wanted_logprobs: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.done = not LEGAL_MOVES[self.state]
        self.id = f"{self.request.id}#{self.choice}"
        self.prompt_len = len(self.request.prompt_token_ids)
        self.stop_token_ids = self.request.params.stop_tokens
        self.wanted_logprobs = self.request.params.logprobs

    def found_in(self, index: Any, tokens: int) -> None:
        """Note that its first `tokens` tokens are findable in a pool. What it has added there
        itself, before it was preempted, stays its own."""
        self.found[index] = min(tokens, self.found.get(index, tokens))

    @property
    def length(self) -> int:
        """Tokens of prompt and harvested output."""
        return self.prompt_len + len(self.output)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and harvested output."""
        return [*self.request.prompt_token_ids, *self.output]

    def token(self, place: int) -> int:
        """A token of prompt or harvested output."""
        first = self.prompt_len
        return self.request.prompt_token_ids[place] if place < first else self.output[place - first]

    def tokens(self, start: int, stop: int) -> list[int]:
        """The tokens `[start, stop)` of prompt and harvested output; no other is copied."""
        prompt, first = self.request.prompt_token_ids, self.prompt_len
        cut = self.output[max(0, start - first) : max(0, stop - first)]
        return [*prompt[start:stop], *cut]

    @property
    def reusable(self) -> int:
        """First tokens that need not be computed where their KV is found: all but the last one,
        whose logits are wanted; where log-probabilities of the prompt are missing, as many as can
        tell nothing of them."""
        scores = self.prompt_scores
        return self.length - 1 if scores is None or scores.complete else scores.known - 1

    @property
    def lifetime_tokens(self) -> int:
        """Tokens whose KV it may come to need: all but the last one, whose KV is never read."""
        return self.prompt_len + self.max_new_tokens - 1

    @property
    def tokens_left(self) -> int:
        """How many more it may generate."""
        return self.max_new_tokens - len(self.output)

    @property
    def behind(self) -> bool:
        """Whether it is being worked out which tokens may follow its newest one."""
        return self.constraint is not None and self.constraint.behind

    @property
    def mask(self) -> np.ndarray | None:
        """u32[ceil(V / 32)], the tokens that may come next, as in `interfaces.Masks`; None allows
        all. Whoever asks for the next token must know all before it."""
        return None if self.constraint is None else self.constraint.mask

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

    def leave(self) -> None:
        """Hold nothing and be on no engine."""
        self.pages, self.pool, self.engine, self.row = [], None, None, -1

    def start_over(self) -> None:
        """Go back to the queue from any live state, holding nothing. Its KV is given up, and steps
        that have been dispatched for it no longer count."""
        assert not self.done, f"sequence {self.id} has ended"
        self.state = State.WAITING
        self.epoch += 1
        self.prefilled, self.handoff, self.copied, self.copied_from = 0, None, None, None
        self.leave()


def age(sequence: Sequence) -> int:
    """A key that sorts the oldest first."""
    return sequence.order
