"""What hand-offs have moved, and how long it took, in all and for each sequence."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from pdjax.interfaces.transport import TransferCost


@dataclass
class TransferTotals:
    """Sum of hand-offs: of a sequence, or of a run. What each field means, and its unit, is said in
    `metrics/definitions.py`.

    Several sequences may share a shipment. Each has its own part of the bytes and pages, and counts
    the shipment, its pieces and its puts whole; a run counts every shipment once.
    """

    transfers: int = 0
    shipments: int = 0
    bytes: int = 0
    pages: int = 0
    pieces: int = 0
    puts: int = 0
    layout_changing_puts: int = 0
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

    def add_handoff(self, other: "TransferTotals") -> None:
        """Count `other`, but for what its shipments moved: they are counted by themselves."""
        for name in _OF_HANDOFFS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def add_shipment(self, cost: TransferCost) -> None:
        """Count a shipment."""
        self.add_part(cost, cost.bytes, cost.pages)

    def add_part(self, cost: TransferCost, nbytes: int, pages: int) -> None:
        """Count a shipment of which so many bytes and pages are its own."""
        self.shipments += 1
        self.bytes += nbytes
        self.pages += pages
        self.pieces += cost.pieces
        self.puts += cost.puts
        self.layout_changing_puts += cost.layout_changing_puts

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


_TOTALS, _COSTS = (tuple(x.name for x in fields(each)) for each in (TransferTotals, TransferCost))
"""Named once: to ask a dataclass takes longer than to add."""
_OF_HANDOFFS = tuple(name for name in _TOTALS if name not in ("shipments", *_COSTS))


@dataclass
class Link:
    """What moved from one pool to another, beside what the link can do; see
    `metrics/definitions.py`."""

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
