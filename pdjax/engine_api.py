"""The door between the host column and the device column: what the host may ask of a mesh, as types
and protocols.

Everything that goes through it is numpy, and *fresh*: an array handed over is never written again,
since a device may read it after the call has returned. Every call returns at once; work in flight
is a Ticket.

There are three kinds of engine behind these protocols: real ones (`device/engine.py`), fake ones in
the tests, whose answers can be worked out by hand, and simulated ones.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pdjax.kv_layout import KVLayout

USE_FED_BACK = -1
"""In `DecodeBatch.tokens`: the row's input is the token that the device sampled for it last."""

IDLE_ROW = -1
"""In `DecodeBatch.positions`: nobody sits in this row; it writes to the null page and its token
means nothing."""

Array = Any
"""A numpy array as it goes through the door; a traced one inside a step on the other side."""

ResultT = TypeVar("ResultT", covariant=True)


class Ticket(Protocol[ResultT]):
    """Work dispatched to a mesh."""

    def ready(self) -> bool:
        """Whether `result` would return without waiting."""
        ...

    def result(self) -> ResultT:
        """The outcome; waits for it. The same object every time."""
        ...


@dataclass(frozen=True)
class SamplingBatch:
    """How the next token of each row is chosen; fields of `SamplingParams`, one entry a row.

    Rows nobody sits in are greedy and ask for nothing.
    """

    temperature: Array  # f32[B]
    top_k: Array  # i32[B]
    top_p: Array  # f32[B]
    min_p: Array  # f32[B]
    presence_penalty: Array  # f32[B]
    frequency_penalty: Array  # f32[B]
    repetition_penalty: Array  # f32[B]
    seed: Array  # u32[B]
    prompt_lens: Array  # i32[B]: how much of the history is prompt, not output
    logprobs: Array  # bool[B]: whether log-probabilities are wanted


@dataclass(frozen=True)
class Sampled:
    """Chosen tokens and log-probabilities (undefined where they were not asked for)."""

    tokens: Array  # i32[B]
    chosen_logprobs: Array  # f32[B]
    top_ids: Array  # i32[B, n], best first
    top_logprobs: Array  # f32[B, n]


@dataclass(frozen=True)
class PrefillBatch:
    """Chunks of several prompts, packed and padded to a bucket. B counts sequences, T tokens, Z
    pages.

    Sequence b owns tokens `cu_q_lens[b]:cu_q_lens[b+1]` and pages
    `kv_pages[cu_pages[b]:cu_pages[b+1]]`, the latter in the order of their positions and including
    the pages that earlier chunks wrote. Padding tokens are past `cu_q_lens[B]` and write to the
    null page.
    """

    tokens: Array  # i32[T]
    positions: Array  # i32[T]
    slot_mapping: Array  # i32[T]: page * page_size + offset
    kv_pages: Array  # i32[Z]
    cu_pages: Array  # i32[B + 1]
    cu_q_lens: Array  # i32[B + 1]
    kv_lens: Array  # i32[B]: tokens in KV, this chunk's included
    sample_at: Array  # i32[B]: index of the token whose logits choose the next one
    sampling: SamplingBatch  # [B]
    history: Array | None  # i32[B, C]: all tokens so far, where any row is penalized; else None


@dataclass(frozen=True)
class DecodeBatch:
    """One tick of a decode pipeline of R stages and R microbatches of b rows each.

    At tick t stage s works on microbatch (t - s) mod R. So microbatch t mod R *enters* stage 0 with
    its input tokens, and microbatch (t - R + 1) mod R *leaves* the last stage and has its next
    tokens sampled; those are kept on the device and fed back when it enters again, at the next
    tick. With R = 1 a tick is a whole decode step.

    The host describes the rows under every stage anew at each tick. So a row that it drops is idle
    at once in all stages, and its pages may be given to somebody else before the pipeline has
    drained.
    """

    tick: int
    tokens: Array  # i32[b]: input of the microbatch that enters, or USE_FED_BACK
    positions: Array  # i32[R, b]: position of the input token under each stage, or IDLE_ROW
    page_table: Array  # i32[R, b, W]: pages under each stage, null where there are none
    sampling: SamplingBatch  # [b]: of the microbatch that leaves


class PrefillEngine(Protocol):
    """Owner of a prefill mesh: parameters, pool of pages, compiled steps."""

    layout: KVLayout
    num_pages: int  # null page included

    def prefill(self, batch: PrefillBatch) -> Ticket[Sampled]:
        """Dispatch one packed step. Steps run in the order of the calls."""
        ...


class DecodeEngine(Protocol):
    """Owner of a decode mesh. Everything it is asked runs in the order of the calls."""

    layout: KVLayout
    num_pages: int  # null page included

    def tick(self, batch: DecodeBatch) -> Ticket[Sampled]:
        """Dispatch one tick; the ticket holds the tokens of the microbatch that leaves."""
        ...

    def remember(self, row: int, token_ids: Array) -> None:
        """Set the history of `row` (0 <= row < R * b; microbatch row // b) to token_ids i32[C], for
        its penalties.

        Called before a penalized sequence's first tick in a row; from then on the device appends
        what it samples.
        """
        ...


@dataclass(frozen=True)
class TransferCost:
    """What a hand-off moved."""

    bytes: int  # over the wire, padding pages included
    pages: int  # of the sequence, without padding
    pieces: int  # single-device arrays
    puts: int  # batched device_put calls
    layout_changing_puts: int  # fell to the host; must be 0


class TransferTicket(Ticket[TransferCost], Protocol):
    """A hand-off in flight: ready once every piece has arrived on the receiving mesh."""


class Transfer(Protocol):
    """Moves pages from a prefill engine's pool to a decode engine's pool."""

    def shares_pool(self, source: int, target: int) -> bool:
        """Whether prefill engine `source` and decode engine `target` keep their pages in one and
        the same pool.

        Then a hand-off moves ownership, not bytes, and neither `start` nor `land` is called.
        """
        ...

    def start(
        self,
        source: int,
        target: int,
        source_pages: Array,
        target_pages: Array,
        pages: int,
    ) -> TransferTicket:
        """Begin to move `source_pages` i32[n] to `target_pages` i32[n]; both padded with the null
        page from `pages` on.

        Returns before the prefill that writes the pages has finished. The source pages must stay
        untouched by later work of the source engine that was not ordered before this call, and
        allocated until the ticket is ready.
        """
        ...

    def land(self, ticket: TransferTicket) -> None:
        """Write what has arrived into the target's pool, ordered before every later tick there."""
        ...
