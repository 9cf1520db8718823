"""How KV moves from one pool to another, as types and a protocol."""

import enum
from dataclasses import dataclass
from typing import Protocol

from pdjax.interfaces.batches import Array
from pdjax.interfaces.tickets import Ticket


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
