"""How far one choice of a request has come (Sequence: running state), and its legal moves."""

import enum
from dataclasses import dataclass, field
from typing import Any

from pdjax.core.outputs import TokenLogprobs
from pdjax.core.request import Request


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
      handoff: its hand-off, while there is one; see host/handoff/handoff.py.
      failed_handoffs: those that failed for good, after which it was prefilled anew.
      streams: whether its KV may leave before it has to: while it is prefilled, or for another
        decode engine.
      page_keys: of its whole pages, as far as they have been asked for; see
        host/kv/prefix_index.py.
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
    text: Any = None  # a TextStream where text was asked for; see text/text_stream.py
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
