"""Shipments under way: what leaves together, how much may be on the way at once, what has come.

Parts of many hand-offs between the same two pools travel in one shipment, since each has a cost of
its own however small it is. What comes back is for those parts alone whose hand-off still wants
them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from pdjax.config import HandoffConfig
from pdjax.core.clock import Clock
from pdjax.host.batching.buckets import Buckets, fit
from pdjax.host.engines import is_ready
from pdjax.host.handoff.accounting import TransferTotals
from pdjax.host.handoff.handoff import Handoff, Part
from pdjax.host.handoff.spans import span_pages
from pdjax.host.metrics.recorder import Recorder
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transfer import End, Shipment, Transfer, TransferCost, TransferTicket

Parts = tuple[Handoff, np.ndarray, slice]
"""Spans of a hand-off, i64[n], in some of its layer groups."""


_PATIENCE = 60.0
"""Seconds after which what nobody waits for is given up, where there is no deadline."""


class CorruptPages(RuntimeError):
    """Pages whose checksum on arrival was not that of the source."""


@dataclass(frozen=True)
class _Item:
    """What a shipment has of one hand-off, which was of that generation then."""

    handoff: Handoff
    spans: np.ndarray
    groups: slice
    generation: int

    @property
    def wanted(self) -> bool:
        return self.handoff.wanted and self.generation == self.handoff.generation

    def mark(self, part: Part) -> None:
        if self.wanted:
            self.handoff.mark(self.spans, self.groups, part)


@dataclass(eq=False)
class _Shipped:
    """A shipment, and the moments of its way."""

    items: tuple[_Item, ...]
    ticket: TransferTicket
    nbytes: int
    sent: float
    gathered: float | None = None
    on_wire: float = 0.0
    arrived: float = 0.0
    cost: TransferCost | None = None
    landing: Ticket[int] | None = None
    landed: list[_Item] = field(default_factory=list)  # counted as there

    @property
    def ends(self) -> tuple[End, End]:
        return self.items[0].handoff.ends

    @property
    def wanted(self) -> bool:
        return any(item.wanted for item in self.items)


@dataclass
class Shipping:
    """Sends and lands.

    Attributes:
      config: whether pages are checked, and how many bytes may be on the way.
      transfer: moves the bytes.
      buckets: sizes of shipments.
      clock, recorder: tell the time, and take down what happened when.
      failed: told of each hand-off that a shipment failed for.
      lost: told of each hand-off whose pages have not been written, though they had arrived.
      blocked: something could not leave at the last `send`, since too much is on the way.
    """

    config: HandoffConfig
    transfer: Transfer
    buckets: Buckets
    clock: Clock
    recorder: Recorder
    failed: Callable[[Handoff, BaseException], None]
    lost: Callable[[Handoff, BaseException], None]
    blocked: bool = field(default=False, init=False)
    _sent: list[_Shipped] = field(default_factory=list)
    _landing: list[_Shipped] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether anything that somebody wants is on its way, or anything being written."""
        return bool(self._landing) or any(shipped.wanted for shipped in self._sent)

    @property
    def bytes_in_flight(self) -> int:
        """Of what has left and not arrived, wanted or not."""
        return sum(shipped.nbytes for shipped in self._sent)

    def send(self, parts: Iterable[Parts]) -> bool:
        """Send as much of `parts` as may be on the way, those of the oldest hand-off first; nobody
        overtakes. Returns whether anything left."""
        together: dict[tuple[End, End, int, int], list[Parts]] = defaultdict(list)
        for handoff, spans, groups in parts:
            if spans.size:
                key = (*handoff.ends, groups.start, groups.stop)
                together[key].append((handoff, spans, groups))
        loads = [load for alike in together.values() for load in self._loads(alike)]
        loads.sort(key=lambda load: load[0].handoff.id)
        busy = self.blocked = False
        for load in loads:
            items = tuple(item for item in load if item.wanted)
            if not items:
                continue
            if not self._may_leave(items):
                self.blocked = True
                break
            self._send(items)
            busy = True
        return busy

    def _loads(self, alike: list[Parts]) -> list[tuple[_Item, ...]]:
        """Parts between the same pools, cut into shipments that keep within the bound of bytes, or
        are as small as shipments are."""
        handoff, _, groups = alike[0]
        bound, each = self.config.max_bytes_in_flight, _span_bytes(handoff, groups)
        sizes = self.buckets.handoff_spans
        fitting = [size for size in sizes if bound is None or size * each <= bound]
        most, loads, room = (fitting or sizes[:1])[-1], list[list[_Item]](), 0
        for handoff, spans, groups in alike:
            while spans.size:
                if not room:
                    loads.append([])
                    room = most
                here, spans = spans[:room], spans[room:]
                loads[-1].append(_Item(handoff, here, groups, handoff.generation))
                room -= here.size
        return [tuple(load) for load in loads]

    def _may_leave(self, items: tuple[_Item, ...]) -> bool:
        """Whether it keeps within the bound of bytes; a shipment that is larger than the bound
        travels alone."""
        most, on_the_way = self.config.max_bytes_in_flight, self.bytes_in_flight
        return most is None or not on_the_way or on_the_way + self._nbytes(items) <= most

    def _nbytes(self, items: tuple[_Item, ...]) -> int:
        """Of the KV that leaves, padding included."""
        spans = fit(self.buckets.handoff_spans, sum(item.spans.size for item in items))
        return spans * _span_bytes(items[0].handoff, items[0].groups)

    def _send(self, items: tuple[_Item, ...]) -> None:
        first = items[0].handoff
        groups = first.groups[items[0].groups]
        source, target = first.ends
        size = first.source.engine.layout.page_size
        pages = span_pages(
            ((item.handoff.pages, item.spans.tolist()) for item in items), size, self.buckets
        )
        shipment = Shipment(
            source=source,
            target=target,
            layers=range(groups[0].start, groups[-1].stop),
            source_pages=pages,
            pages=int(np.count_nonzero(pages)),
            checked=self.config.checksums,
        )
        now = self.clock.now()
        for item in items:
            item.mark(Part.SENT)
            item.handoff.left = now
        try:
            ticket = self.transfer.send(shipment)
        except BaseException as error:
            self._fail(items, error)
        else:
            self._sent.append(_Shipped(items, ticket, self._nbytes(items), now))

    def land(self) -> bool:
        """Write what has arrived. Returns whether there was anything."""
        before = len(self._sent), len(self._landing)
        oldest = self.clock.now() - (self.config.deadline or _PATIENCE)
        for shipped in list(self._sent):
            if not shipped.wanted:
                # Nobody waits for it, but it takes its room as long as it is on the way; unless
                # it has been for so long that it will never come.
                if is_ready(shipped.ticket) or shipped.sent < oldest:
                    self._sent.remove(shipped)
                continue
            if shipped.gathered is None and shipped.ticket.gathered():
                shipped.gathered = self.clock.now()
            if is_ready(shipped.ticket):
                self._sent.remove(shipped)
                self._arrive(shipped)
                if shipped.landing is not None and not self.config.checksums:
                    # What is dispatched there later will find it.
                    self._landed(shipped)
        for shipped in list(self._landing):
            if shipped.landing is not None and is_ready(shipped.landing):
                self._landing.remove(shipped)
                self._written(shipped)
        return before != (len(self._sent), len(self._landing))

    def _arrive(self, shipped: _Shipped) -> None:
        """All of it has come: begin to write what is still wanted."""
        now = shipped.arrived = self.clock.now()
        try:
            cost = shipped.cost = shipped.ticket.result()
            source, target = shipped.ends
            link = self.recorder.link(source, target)
            # The host looks now and then: if it saw both ends of the way at once, the way took
            # what it must at least.
            seen = now if shipped.gathered is None else shipped.gathered
            least = cost.bytes / link.peak if link.peak else 0.0
            shipped.on_wire = max(shipped.sent, min(seen, now - least))
            link.add(cost.bytes, shipped.on_wire, now)
            size = shipped.items[0].handoff.target.engine.layout.page_size
            pages = span_pages(
                (
                    (item.handoff.target_pages if item.wanted else [], item.spans.tolist())
                    for item in shipped.items
                ),
                size,
                self.buckets,
            )
            shipped.landing = self.transfer.land(shipped.ticket, pages)
            self._landing.append(shipped)
        except BaseException as error:
            self._fail(shipped.items, error)

    def _written(self, shipped: _Shipped) -> None:
        """It has been written; see whether it was whole."""
        seconds = self.clock.now() - shipped.arrived
        try:
            assert shipped.landing is not None
            damaged = shipped.landing.result()
            if damaged:
                raise CorruptPages(f"{damaged} pages arrived damaged")
        except BaseException as error:
            for item in shipped.landed:
                if not item.handoff.closed:  # whatever of it has been disowned meanwhile
                    item.handoff.mark(item.spans, item.groups, Part.UNSENT)
                self.lost(item.handoff, error)
            self._fail(shipped.items, error)
            return
        total = sum(item.spans.size for item in shipped.items)
        for item in shipped.items:
            share = TransferTotals(scatter_s=seconds * item.spans.size / total)
            self.recorder.transfer(item.handoff.sequence, share)
        if self.config.checksums:
            self._landed(shipped)

    def _landed(self, shipped: _Shipped) -> None:
        """Parts that are there, and can be relied on."""
        assert shipped.cost is not None
        total = sum(item.spans.size for item in shipped.items)
        gathered = shipped.on_wire
        for item in shipped.items:
            if not item.wanted:
                continue
            item.mark(Part.LANDED)
            shipped.landed.append(item)
            handoff, costs = item.handoff, item.handoff.costs
            costs.add_shipment(shipped.cost, item.spans.size / total)
            departed = shipped.arrived if handoff.departed is None else handoff.departed
            costs.wire_s += shipped.arrived - gathered
            costs.exposed_s += max(0.0, shipped.arrived - max(gathered, departed))
            if handoff.departed is not None:
                costs.gather_s += max(0.0, gathered - max(shipped.sent, departed))

    def _fail(self, items: tuple[_Item, ...], error: BaseException) -> None:
        wanted = [item for item in items if item.wanted]
        for item in wanted:
            item.mark(Part.UNSENT)
        for handoff in {item.handoff.id: item.handoff for item in wanted}.values():
            self.failed(handoff, error)
        if not isinstance(error, Exception):
            raise error


def _span_bytes(handoff: Handoff, groups: slice) -> int:
    """Of one span in some layer groups, at the sending end."""
    layout = handoff.source.engine.layout
    layers = sum(len(group) for group in handoff.groups[groups])
    return handoff.span * layers * layout.page_bytes // (layout.num_layers * layout.page_size)
