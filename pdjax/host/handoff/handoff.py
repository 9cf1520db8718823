"""One hand-off: which part of a sequence's KV has to move from one pool to another, how far each
piece of it has come, and what is held for it at both ends.

    reserved -> (sent, landed) for each part -> complete: only then may the sequence decode

KV is divided into spans of tokens (see `interfaces.Shipment`) and the layer groups of the source. A
ledger has an entry for each part, so "all pages are present" is looked up, not believed.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pdjax.host.engines import DecodeLane, Lane, PrefillLane
from pdjax.host.handoff.accounting import TransferTotals
from pdjax.host.sequences.reference import Member
from pdjax.host.sequences.sequence import Sequence
from pdjax.interfaces.transfer import End


class Part(enum.IntEnum):
    """How far a part has come."""

    UNSENT = 0
    SENT = 1
    LANDED = 2


class Purpose(enum.Enum):
    """What for the KV moves."""

    DECODE = "decode"  # the sequence goes on there
    CACHE = "cache"  # it has ended, and others may find its prefix there


@dataclass(eq=False)
class Handoff:
    """A hand-off, from the moment that room is reserved for it at the receiving end.

    Attributes:
      id: unique within a coordinator.
      member: the sequence, as it was then.
      purpose: what for.
      source, target: who owns the pages at each end.
      groups: layers that leave together, in order; of the source.
      tokens: how many of the sequence have KV that must be there in the end.
      span: tokens of a span.
      target_pages: held at the receiving end, in order; the first `skipped_tokens` of the KV were
        in them already (delta hand-off).
      row: reserved there; -1 where none is.
      opened: moment of the reservation.
      source_pages: held at the sending end, once the sequence has let go of them (`departed`).
      departed: moment at which the sequence had nothing left to do but to wait for this.
      left: moment at which something of it last left.
      computed: tokens of which KV has been dispatched through all layers.
      idle: nothing can be sent until more has been computed or something has failed.
      attempts: that failed.
      generation: counts disownments; what was sent in an earlier one is not wanted any more.
      closed: it holds nothing any longer. `completed`: since all of it has landed.
      costs: what it has moved so far, and how long that took.
    """

    id: int
    member: Member
    purpose: Purpose
    source: Lane
    target: Lane
    groups: tuple[range, ...]
    tokens: int
    span: int
    target_pages: list[int]
    skipped_tokens: int
    row: int
    opened: float
    source_pages: list[int] = field(default_factory=list)
    departed: float | None = None
    left: float = 0.0
    computed: int = 0
    idle: bool = False
    attempts: int = 0
    generation: int = 0
    closed: bool = False
    completed: bool = False
    costs: TransferTotals = field(default_factory=TransferTotals)

    def __post_init__(self) -> None:
        self._ledger = np.full((self.spans, len(self.groups)), Part.UNSENT, np.uint8)
        self._ledger[: self.skipped_tokens // self.span] = Part.LANDED

    @property
    def sequence(self) -> Sequence:
        return self.member.sequence

    @property
    def spans(self) -> int:
        """How many there are; the last may be partly filled."""
        return -(-self.tokens // self.span)

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return not self.closed and (self.purpose is Purpose.CACHE or self.member.current)

    @property
    def complete(self) -> bool:
        """Whether every part has landed."""
        return bool((self._ledger == Part.LANDED).all())

    def waiting_since(self, now: float) -> float:
        """Seconds for which the sequence has waited for what is on its way; 0 if nothing is."""
        if self.departed is None or not (self._ledger == Part.SENT).any():
            return 0.0
        return now - max(self.departed, self.left)

    @property
    def ends(self) -> tuple[End, End]:
        """Where from and where to."""
        return self.source.end, self.target.end

    @property
    def pages(self) -> list[int]:
        """Where the KV is at the sending end."""
        return self.source_pages if self.departed is not None else self.sequence.pages

    def sendable(self, group: int, computed: int) -> np.ndarray:
        """Spans of a layer group that may leave and have not, if KV of `computed` tokens has been
        dispatched; i64[n]."""
        ready = self.spans if computed >= self.tokens else computed // self.span
        return np.flatnonzero(self._ledger[:ready, group] == Part.UNSENT)

    def unsent(self) -> list[tuple[np.ndarray, slice]]:
        """What may leave now: spans in all layer groups, and in each those that may leave only
        there."""
        if self.idle:
            return []
        each = [self.sendable(group, self.computed) for group in range(len(self.groups))]
        self.idle = not any(spans.size for spans in each)
        whole = each[0]
        for spans in each[1:]:
            whole = np.intersect1d(whole, spans, assume_unique=True)
        rest = [np.setdiff1d(spans, whole, assume_unique=True) for spans in each]
        parts = [(whole, slice(0, len(self.groups)))]
        parts += [(spans, slice(group, group + 1)) for group, spans in enumerate(rest)]
        return [(spans, groups) for spans, groups in parts if spans.size]

    def mark(self, spans: np.ndarray, groups: slice, part: Part) -> None:
        """These parts have come so far."""
        self._ledger[spans, groups] = part
        if part is Part.UNSENT:
            self.idle = False

    def has_computed(self, tokens: int) -> None:
        """KV of the first `tokens` has been dispatched through all layers."""
        self.computed, self.idle = tokens, False

    def disown(self) -> None:
        """Whatever is on its way is not wanted any more, and has to be sent again."""
        self.generation += 1
        self.idle = False
        self._ledger[self._ledger == Part.SENT] = Part.UNSENT

    def skip_nothing(self) -> None:
        """What the target had already is not right after all: it is sent, too."""
        self._ledger[: self.skipped_tokens // self.span] = Part.UNSENT
        self.skipped_tokens, self.costs.pages_skipped = 0, 0
        self.idle = False

    def held(self) -> Iterator[tuple[Lane, list[int]]]:
        """The pages that it holds, and where."""
        if not self.closed:
            yield self.target, self.target_pages
            if self.departed is not None:
                yield self.source, self.source_pages

    def close(self) -> None:
        """Let go of everything at both ends. What is still on its way lands nowhere: the source has
        been read in order, and nothing is written to the target before it lands."""
        self.target.allocator.free(self.target_pages)
        if self.row >= 0:
            assert isinstance(self.target, DecodeLane)
            self.target.pipeline.drop(self.row)
        self.let_source_go()
        self.closed = True

    def withdraw(self) -> None:
        """Give up the room at the target, of a sequence that is still being prefilled. Its KV does
        not leave ahead any more."""
        self.close()
        self.sequence.handoff, self.sequence.streams = None, False

    def leave_if_complete(self) -> bool:
        """Where every part has landed, what was reserved is the sequence's from now on, and the
        source's pages are let go. Returns whether it is so."""
        if self.complete:
            self.let_source_go()
            self.closed = self.completed = True
        return self.completed

    def stay(self) -> list[int]:
        """Let go of the target alone. Returns the source's pages, which are the caller's now."""
        pages, self.source_pages = self.source_pages, []
        self.close()
        return pages

    def let_source_go(self) -> None:
        """Let go of the pages that were copied."""
        if self.departed is not None:
            self.source.allocator.free(self.source_pages)
            self.source_pages = []


def groups_of(lane: Lane) -> tuple[range, ...]:
    """The layers that leave a lane together."""
    if isinstance(lane, PrefillLane):
        return lane.engine.layer_groups
    return (range(lane.engine.layout.num_layers),)
