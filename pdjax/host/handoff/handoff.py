"""One hand-off: which part of a sequence's KV has to move from one pool to another, how far each
piece of it has come, and what is held for it at both ends.

    reserved -> (sent, landed) for each part -> complete: only then may the sequence decode

KV is divided into spans of tokens (see `spans.py`) and the layer groups of the source. A ledger has
an entry for each part, so that "all pages are present" is looked up, not believed.
"""

import enum
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from pdjax.core.ids import PoolId
from pdjax.host.engines import EngineState
from pdjax.host.handoff.accounting import TransferTotals
from pdjax.host.handoff.spans import Spans
from pdjax.host.kv.pools import PoolState
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.reference import SequenceRef
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.engine import StepTicket

_LOG = logging.getLogger("pdjax")


class Part(enum.IntEnum):
    """How far a part has come."""

    UNSENT = 0
    SENT = 1
    WRITTEN = 2


class Purpose(enum.Enum):
    """Why the KV moves."""

    DECODE = "decode"  # its sequence was prefilled, and decodes there
    MIGRATE = "migrate"  # its sequence decodes, and goes on there
    CACHE = "cache"  # its sequence has ended, and later prompts may find their prefix there


@dataclass(eq=False)
class Handoff:
    """A hand-off, from the moment that room is reserved for it at the receiving end.

    Attributes:
      id: unique within a coordinator.
      ref: the sequence, as it was then.
      purpose: why.
      source, target: the pools at both ends.
      engine: the engine of the target that the sequence decodes on; None for a cache.
      groups: layers that leave together, in order; of the source.
      tokens: how many of the sequence have KV that must be there in the end.
      spans_of: the spans between the two pools.
      target_pages: held at the receiving end, in order; the first `skipped_tokens` of the KV were
        in them already (delta hand-off).
      row: reserved there; -1 where none is.
      opened: moment of the reservation.
      source_pages: held at the sending end, once the sequence has let go of them (`departed`).
      departed: moment at which the sequence had nothing left to do but to wait for this.
      left: moment at which something of it last left; minus infinity before.
      computed: tokens of which KV has been dispatched through all layers.
      attempts: that failed.
      generation: counts disownments; what was sent in an earlier one is not wanted any more.
      chooses: the step that chooses the sequence's next token, and the sequence's index in it;
        None before its last chunk is dispatched.
      ahead: whether its row has begun before that token was known, see `run_ahead.py`.
      closed: it holds nothing any longer. `completed`: since all of it has been written.
      costs: what it has moved so far, and how long that took.
    """

    id: int
    ref: SequenceRef
    purpose: Purpose
    source: PoolState
    target: PoolState
    engine: EngineState | None
    groups: tuple[range, ...]
    tokens: int
    spans_of: Spans
    target_pages: list[int]
    skipped_tokens: int
    row: int
    opened: float
    source_pages: list[int] = field(default_factory=list)
    departed: float | None = None
    left: float = -math.inf
    computed: int = 0
    attempts: int = 0
    generation: int = 0
    chooses: tuple[StepTicket, int] | None = None
    ahead: bool = False
    closed: bool = False
    completed: bool = False
    costs: TransferTotals = field(default_factory=TransferTotals)

    def __post_init__(self) -> None:
        self._ledger = np.full((self.spans, len(self.groups)), Part.UNSENT, np.uint8)
        self._ledger[: self.skipped_tokens // self.span] = Part.WRITTEN
        self._is_nearly_written: bool | None = None  # None: the ledger has changed since

    @property
    def sequence(self) -> Sequence:
        return self.ref.sequence

    @property
    def span(self) -> int:
        """Tokens of a span."""
        return self.spans_of.tokens

    @property
    def spans(self) -> int:
        """How many there are; the last may be partly filled."""
        return -(-self.tokens // self.span)

    @property
    def wanted(self) -> bool:
        """Whether its KV is still of use at the target."""
        return not self.closed and (self.purpose is Purpose.CACHE or self.ref.is_current)

    @property
    def complete(self) -> bool:
        """Whether every part has been written."""
        return bool((self._ledger == Part.WRITTEN).all())

    @property
    def nearly_written(self) -> bool:
        """Whether every part has been written but for those of the last layer group, of which every
        one has at least been sent. It is asked with every event of any transfer job."""
        if self._is_nearly_written is None:
            rest, last = self._ledger[:, :-1], self._ledger[:, -1]
            written = (rest == Part.WRITTEN).all() and (last != Part.UNSENT).all()
            self._is_nearly_written = bool(written)
        return self._is_nearly_written

    @property
    def waits(self) -> bool:
        """Whether anything of it is on its way."""
        return bool((self._ledger == Part.SENT).any())

    @property
    def ends(self) -> tuple[PoolId, PoolId]:
        """Where from and where to."""
        return self.source.id, self.target.id

    @property
    def pages(self) -> list[int]:
        """Where the KV is at the sending end."""
        return self.source_pages if self.departed is not None else self.sequence.pages

    def sendable(self, computed: int) -> np.ndarray:
        """Spans that may leave and have not in any layer group, if KV of `computed` tokens has been
        dispatched; i64[n]. Those that have to leave again in some groups are `unsent`."""
        return self._unsent(computed).all(axis=1).nonzero()[0]

    def _unsent(self, computed: int) -> np.ndarray:
        """bool[spans, groups]: parts that have not left, of spans whose KV has been dispatched."""
        ready = self.spans if computed >= self.tokens else computed // self.span
        return self._ledger[:ready] == Part.UNSENT

    def unsent(self) -> list[tuple[np.ndarray, slice]]:
        """What may leave now: spans in all layer groups, and in each those that may leave only
        there."""
        unsent = self._unsent(self.computed)
        if not unsent.any():
            return []  # nearly always: it has left with the steps that computed it
        whole = unsent.all(axis=1)
        rest = unsent & ~whole[:, None]
        parts = [(np.flatnonzero(whole), slice(0, len(self.groups)))]
        parts += [
            (np.flatnonzero(rest[:, group]), slice(group, group + 1))
            for group in range(len(self.groups))
        ]
        return [(spans, groups) for spans, groups in parts if spans.size]

    def pages_in(self, spans: np.ndarray) -> int:
        """Pages of the source that the sequence has in some spans, i64[n], ascending: the last span
        may be partly filled."""
        each = self.span // self.source.layout.page_size
        beyond = (int(spans[-1]) + 1) * each - len(self.pages)
        return each * spans.size - max(0, beyond)

    def mark(self, spans: np.ndarray, groups: slice, part: Part) -> None:
        """These parts have come so far."""
        self._ledger[spans, groups] = part
        self._is_nearly_written = None

    def has_computed(self, tokens: int) -> None:
        """KV of the first `tokens` has been dispatched through all layers."""
        self.computed = tokens

    def disown(self) -> None:
        """What is on its way is not wanted any more, and has to be sent again."""
        self.generation += 1
        self._ledger[self._ledger == Part.SENT] = Part.UNSENT
        self._is_nearly_written = None

    def skip_nothing(self) -> None:
        """What the target had already is not right: it is sent, too."""
        self._ledger[: self.skipped_tokens // self.span] = Part.UNSENT
        self._is_nearly_written = None
        self.skipped_tokens, self.costs.pages_skipped = 0, 0

    def take_source(self, pages: list[int]) -> None:
        """Hold the pages at the sending end, which the sequence has let go of."""
        self.source_pages = pages
        self.source.leaving += len(pages)

    def held(self) -> Iterator[tuple[PoolState, list[int]]]:
        """The pages that it holds, by pool."""
        if not self.closed:
            yield self.target, self.target_pages
            if self.departed is not None:
                yield self.source, self.source_pages

    def run_ahead(self) -> bool:
        """Let its row begin with the token that is being chosen. Returns whether there is a page
        for that."""
        assert self.engine is not None, "its sequence is to decode"
        missing = self.target.pages_for(self.sequence.length + 1) - len(self.target_pages)
        if missing > self.target.allocator.free_pages:
            return False
        self.target_pages += self.target.allocator.allocate(missing)
        self.engine.rows.run_ahead(self.row, self.sequence, self.target_pages)
        self.ahead = True
        return True

    def close(self) -> None:
        """Let go of everything at both ends. What is still on its way is not written: the source
        has been read in order, and nothing is written to the target before it has arrived."""
        self.target.allocator.free(self.target_pages)
        if self.engine is not None:
            self.engine.rows.release(self.row)
        self.let_source_go()
        self.closed = True

    def withdraw(self) -> None:
        """Give up the room at the target, of a sequence that is still being prefilled. Its KV does
        not leave ahead any more."""
        self.close()
        self.sequence.handoff, self.sequence.streams = None, False

    def leave_if_complete(self) -> bool:
        """If every part has been written, let go of the source's pages; what was reserved is the
        sequence's from now on. Returns whether it is so."""
        if self.complete:
            self.let_source_go()
            self.closed = self.completed = True
        return self.completed

    def stay(self) -> list[int]:
        """Let go of the target alone. Returns the source's pages, which are the caller's now."""
        pages, self.source_pages = self.source_pages, []
        self.source.leaving -= len(pages)
        self.close()
        return pages

    def let_source_go(self) -> None:
        """Let go of the pages that were copied."""
        if self.departed is not None:
            self.source.leaving -= len(self.source_pages)
            self.source.allocator.free(self.source_pages)
            self.source_pages = []

    def record(self, arrived: float, recorder: Recorder) -> None:
        """Take down what it has cost, once all of it is there."""
        assert self.departed is not None, "its sequence waits for it"
        costs = self.costs
        costs.transfers, costs.seconds = 1, arrived - self.departed
        costs.hidden_s = max(0.0, costs.wire_s - costs.exposed_s)
        recorder.transfer(self.sequence, costs)
        recorder.free_pages(self.source.id, self.source.allocator.free_pages)
        if costs.layout_changing_puts:
            text = "%s: a hand-off changed a layout in a put, by way of the host"
            _LOG.warning(text, self.target.id)


def whole(pool: PoolState) -> tuple[range, ...]:
    """All layers of a pool, as one group."""
    return (range(pool.layout.num_layers),)


def unsent_of(handoffs: Mapping[int, Handoff]) -> Iterator[tuple[Handoff, np.ndarray, slice]]:
    """What of open hand-offs may leave now, those of the oldest first."""
    for _, handoff in sorted(handoffs.items()):
        if not handoff.closed:
            for spans, groups in handoff.unsent():
                yield handoff, spans, groups
