"""The door between the host column and the device column: what the host may ask of a mesh, as types
and protocols.

Everything that goes through it is numpy, and *fresh*: an array handed over is never written again,
since a device may read it after the call has returned. Every call returns at once; work in flight
is a Ticket. What goes wrong is raised by the call, or by its ticket's `result`.

There are three kinds of engine behind these protocols: real ones (`device/engine.py`), fake ones in
the tests, whose answers can be worked out by hand, and simulated ones.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pdjax.kv_layout import KVLayout

USE_FED_BACK = -1
"""In `DecodeBatch.tokens`: the row's input is the token that the device sampled for it last."""

IDLE_ROW = -1
"""In `DecodeBatch.positions`: nobody sits in this row; it writes to the null page and its token
means nothing."""

NOT_FINITE = -1
"""In `Sampled.tokens`: the row's logits are not all finite, so no token was chosen."""

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

    tokens: Array  # i32[B]; NOT_FINITE in place of a token where a row's logits are not finite
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
    sample_at: Array  # i32[B]: index of a chunk's last token; its logits choose the next
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
    layer_groups: tuple[range, ...]
    """Global layers that a step computes in one go, in order; all of them together are the
    model's."""

    @property
    def losses(self) -> int:
        """How often the engine has lost what it keeps on its devices, all pages of its pool
        included, and begun anew with an empty pool.

        A call or a ticket that fails may have lost it: a step donates its pool. The count is up
        before that error can be seen, and before anything that was computed from the empty pool
        can be.
        """
        ...

    def prefill(
        self, batch: PrefillBatch, after_group: Callable[[int], None] | None = None
    ) -> Ticket[Sampled]:
        """Dispatch one packed step. Steps run in the order of the calls.

        Args:
          after_group: called with g when `layer_groups[g]` has been dispatched, or will be before
            anything that is asked from then on, and before the next group is: what a Transfer is
            asked to send then has the KV that the group writes, and leaves while the next group is
            computed. It must not raise.
        """
        ...

    def close(self) -> None:
        """Let go of the memory on the devices. Nothing is asked of the engine from then on; a
        second call does nothing."""
        ...


class DecodeEngine(Protocol):
    """Owner of a decode mesh. Everything it is asked runs in the order of the calls."""

    layout: KVLayout
    num_pages: int  # null page included

    @property
    def losses(self) -> int:
        """See `PrefillEngine.losses`."""
        ...

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

    def close(self) -> None:
        """See `PrefillEngine.close`."""
        ...


class Side(enum.Enum):
    """Which kind of engine."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class End:
    """A pool of pages at one end of a hand-off, named by an engine that keeps its pages there."""

    side: Side
    engine: int

    def __str__(self) -> str:
        return f"{self.side.value}/{self.engine}"


@dataclass(frozen=True)
class Shipment:
    """Pages of some layers, to be sent from one pool to another.

    On arrival they become target pages, which are named only when they land. Both lists hold the
    same tokens in the same order, in spans of max(S, S') tokens, where S and S' are the page sizes
    of the two pools, of which one divides the other: span i is the i-th run of max(S, S')/S source
    pages, and of max(S, S')/S' target pages. Source pages that hold nothing of a sequence, at the
    end of a span or in whole spans of padding, are null.

    Attributes:
      source, target: the pools.
      layers: global layers.
      source_pages: i32[n].
      pages: how many of `source_pages` are not null.
      checked: whether a checksum of each page travels along, and is compared on landing.
    """

    source: End
    target: End
    layers: range
    source_pages: Array
    pages: int
    checked: bool = False


@dataclass(frozen=True)
class TransferCost:
    """What a shipment moved."""

    bytes: int  # over the wire, padding pages and checksums included
    pages: int  # of the source that are of a sequence, in `layers` of the shipment
    pieces: int  # single-device arrays
    puts: int  # batched device_put calls
    layout_changing_puts: int  # fell to the host; must be 0


class TransferTicket(Ticket[TransferCost], Protocol):
    """A shipment in flight: ready once every piece has arrived on the receiving mesh."""

    @property
    def shipment(self) -> Shipment:
        """What was sent."""
        ...

    def gathered(self) -> bool:
        """Whether the source's pages have been read."""
        ...


class Transfer(Protocol):
    """Moves pages from any engine's pool to any other's."""

    def shares_pool(self, source: End, target: End) -> bool:
        """Whether both keep their pages in one and the same pool.

        Then a hand-off moves ownership, not bytes, and neither `send` nor `land` is called.
        """
        ...

    def send(self, shipment: Shipment) -> TransferTicket:
        """Begin to move a shipment; returns before the work that writes its pages has finished.

        The source's pages are read in the order of the calls: after everything that its engine was
        asked before, and before everything that it is asked later. So they may be given to somebody
        else as soon as this returns. Nothing is written to the target's pool before `land`.
        """
        ...

    def land(self, ticket: TransferTicket, target_pages: Array) -> Ticket[int]:
        """Write what has arrived into the target's pool, ordered before everything that its engine
        is asked later.

        Args:
          ticket: of a shipment, ready.
          target_pages: i32[m], m * S' == n * S; null for tokens that nobody wants any longer.

        Returns:
          ready when it has been written; the number of pages, over all devices, whose checksum is
          not that of the source; 0 where the shipment is not checked.
        """
        ...

    def probe(self, source: End, target: End, nbytes: int) -> float:
        """Seconds that one plain put of so many bytes takes, from one device of the source's mesh
        to one of the target's; waits for it. What a hand-off's rate is held against."""
        ...

    def close(self) -> None:
        """Let go of what is kept on devices between shipments. Nothing is sent from then on; a
        second call does nothing."""
        ...
