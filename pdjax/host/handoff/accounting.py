"""What hand-offs have moved, and how long it took, in all and for each sequence."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from pdjax.interfaces.transport import TransferCost


@dataclass
class TransferTotals:
    """Sum of hand-offs. Seconds of different shipments and hand-offs overlap, so sums of them may
    exceed the run's duration.

    Attributes:
      transfers: hand-offs that were completed.
      shipments: pieces of work that they were sent in.
      bytes, pages, pieces, puts, layout_changing_puts: see `interfaces.TransferCost`; a shipment
        that serves several sequences counts in each by its share of the pages.
      pages_skipped: of the target, that held their KV already (delta hand-off).
      retries: attempts that failed, timed out or arrived damaged.
      reprefilled_tokens: computed again because a hand-off had failed for good; must be 0 where
        nothing fails.
      seconds: from the end of the prefill to the last page's landing, or to the start of the
        hand-off if that was later: what it delays.
      gather_s: from the dispatch of a shipment, or the end of its prefill if that was later, to
        the reading of its pages.
      wire_s: from there to its arrival; where the host did not look in between, the time that so
        many bytes take at the link's peak.
      scatter_s: from its arrival to its being written.
      exposed_s: of the time on the wire, what came after the end of the prefill; `hidden_s`: the
        rest, while the prefill still ran.
    """

    transfers: int = 0
    shipments: int = 0
    bytes: float = 0
    pages: float = 0
    pieces: float = 0
    puts: float = 0
    layout_changing_puts: float = 0
    pages_skipped: int = 0
    retries: int = 0
    reprefilled_tokens: int = 0
    seconds: float = 0.0
    gather_s: float = 0.0
    wire_s: float = 0.0
    scatter_s: float = 0.0
    exposed_s: float = 0.0
    hidden_s: float = 0.0

    def add(self, other: "TransferTotals") -> None:
        """Count all of `other`."""
        for name in _TOTALS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def add_shipment(self, cost: TransferCost, share: float) -> None:
        """Count a share of a shipment, in (0, 1]."""
        self.shipments += 1
        for name in _COSTS:
            setattr(self, name, getattr(self, name) + share * getattr(cost, name))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


_TOTALS, _COSTS = (tuple(x.name for x in fields(each)) for each in (TransferTotals, TransferCost))
"""Named once: to ask a dataclass takes longer than to add."""


@dataclass
class Link:
    """What moved from one engine to another, beside what the link can do.

    Attributes:
      bytes, shipments: that arrived.
      wire_s: seconds in which at least one shipment was on the wire.
      peak: bytes a second of a plain put between one pair of devices, measured at the start, times
        the pairs that there are; None if it was not.
    """

    bytes: int = 0
    shipments: int = 0
    wire_s: float = 0.0
    peak: float | None = None
    _last_end: float = float("-inf")

    def add(self, nbytes: int, start: float, end: float) -> None:
        """Count a shipment that was on the wire from `start` to `end`; they come in the order of
        their ends."""
        self.bytes += nbytes
        self.shipments += 1
        self.wire_s += max(0.0, end - max(start, self._last_end))
        self._last_end = max(self._last_end, end)

    @property
    def rate(self) -> float | None:
        """Bytes a second while anything was on the wire."""
        return self.bytes / self.wire_s if self.wire_s > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rate, peak = self.rate, self.peak
        return {
            "bytes": self.bytes,
            "shipments": self.shipments,
            "wire_s": self.wire_s,
            "bytes_per_s": rate,
            "peak_bytes_per_s": peak,
            "of_peak": rate / peak if rate and peak else None,
        }
