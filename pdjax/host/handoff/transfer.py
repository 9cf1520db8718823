"""A transfer job under way, and what it has of each hand-off."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pdjax.host.batching.buckets import fit
from pdjax.host.handoff.handoff import Handoff, Part, Purpose
from pdjax.host.metrics.work import Passenger, Shipment
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transport import TransferCost, TransferJob, TransferTicket


class Item(NamedTuple):
    """What a job has of one hand-off, which was of that generation then; `pages` of the source."""

    handoff: Handoff
    spans: np.ndarray
    groups: slice
    generation: int
    pages: int

    @classmethod
    def of(cls, handoff: Handoff, spans: np.ndarray, groups: slice) -> "Item":
        """Some spans of a hand-off in some of its layer groups."""
        return cls(handoff, spans, groups, handoff.generation, handoff.pages_in(spans))

    @property
    def wanted(self) -> bool:
        return self.handoff.wanted and self.generation == self.handoff.generation

    def mark(self, part: Part) -> None:
        if self.wanted:
            self.handoff.mark(self.spans, self.groups, part)


class Load(NamedTuple):
    """What one job carries: parts of hand-offs between the same two pools, all in the same layer
    groups.

    Attributes:
      pages: of the source, padded to a bucket of spans, i32[n]; `held` of them are not null.
      passengers: whose KV it is.
    """

    items: tuple[Item, ...]
    pages: np.ndarray
    held: int
    passengers: tuple[Passenger, ...]

    @classmethod
    def of(cls, items: tuple[Item, ...]) -> "Load":
        """The load of some items, of which there is at least one."""
        first = items[0].handoff
        pages = first.spans_of.pages(
            ((item.handoff.pages, item.spans.tolist()) for item in items),
            first.source.layout.page_size,
        )
        return cls(items, pages, int(np.count_nonzero(pages)), _passengers_of(items))

    def in_group(self, group: int) -> "Load":
        """The same pages in one layer group."""
        here = slice(group, group + 1)
        items = tuple(
            Item(item.handoff, item.spans, here, item.generation, item.pages) for item in self.items
        )
        return Load(items, self.pages, self.held, self.passengers)


@dataclass(eq=False)
class Transfer:
    """A job, and the moments of its way."""

    job: TransferJob
    items: tuple[Item, ...]
    nbytes: int
    sent: float
    passengers: tuple[Passenger, ...]
    ticket: TransferTicket | None = None  # not before the step that exports it is dispatched
    read: float | None = None
    on_wire: float = 0.0
    arrived: float = 0.0
    cost: TransferCost | None = None
    writing: Ticket[int] | None = None
    written: list[Item] = field(default_factory=list)  # counted as there

    @property
    def wanted(self) -> bool:
        return any(item.wanted for item in self.items)

    def shipment(self, written: float | None) -> Shipment:
        """What a recorder keeps of it, once it has arrived."""
        job, cost = self.job, self.cost
        return Shipment(
            id=job.id,
            source=job.source,
            target=job.target,
            layers=job.layers,
            bytes=self.nbytes if cost is None else cost.bytes,
            pages=job.pages,
            sent=self.sent,
            on_wire=self.on_wire,
            arrived=self.arrived,
            written=written,
            passengers=self.passengers,
        )

    def account(self, handoff: Handoff) -> None:
        """Count the seconds that it took for one of its hand-offs."""
        costs, gathered, arrived = handoff.costs, self.on_wire, self.arrived
        departed = arrived if handoff.departed is None else handoff.departed
        costs.wire_s += arrived - gathered
        costs.exposed_s += max(0.0, arrived - max(gathered, departed))
        if handoff.departed is not None:
            costs.gather_s += max(0.0, gathered - max(self.sent, departed))


def _passengers_of(items: tuple[Item, ...]) -> tuple[Passenger, ...]:
    """The sequences of a job that leaves now."""
    return tuple(
        Passenger(
            sequence.id,
            sequence.home if handoff.purpose is Purpose.DECODE else None,
            sequence.served,
            None if handoff.engine is None else handoff.engine.id,
        )
        for handoff in dict.fromkeys(item.handoff for item in items)
        for sequence in (handoff.sequence,)
    )


def nbytes_of(items: tuple[Item, ...]) -> int:
    """Of the KV that leaves, padding included."""
    handoff = items[0].handoff
    spans = fit(handoff.spans_of.buckets, sum(item.spans.size for item in items))
    return spans * span_bytes(handoff, items[0].groups)


def span_bytes(handoff: Handoff, groups: slice) -> int:
    """Of one span in some layer groups, at the sending end."""
    layout = handoff.source.layout
    layers = sum(len(group) for group in handoff.groups[groups])
    return handoff.span * layers * layout.page_bytes // (layout.num_layers * layout.page_size)
