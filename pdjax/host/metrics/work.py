"""What engines and links did: steps, shipments, and how full pools were. Moments are seconds on the
run's clock."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from pdjax.core.ids import EngineId, PoolId


class Span(NamedTuple):
    """A step of an engine.

    Attributes:
      track: the engine.
      name: "step" of prefill, or "tick".
      start, end: its dispatch, and when its outcome was read.
      args: its counts, which add up over a track.
      who: ids of the sequences that it served, for a reader.
      number: of a prefill step among those of its engine, from 1; 0 of a tick.
    """

    track: str
    name: str
    start: float
    end: float
    args: Mapping[str, int]
    who: str = ""
    number: int = 0

    def names(self, sequence: str) -> bool:
        """Whether `who` has a sequence's id, or leaves out some ids."""
        named = self.who.split(", ")
        return sequence in named or named[-1].endswith(" more")


class Duty(NamedTuple):
    """A time in which an engine was not given all that it could be.

    Attributes:
      engine: its name.
      name: "draining to be decode", "out of service", and the like.
      start, end: the moments.
      cause: why.
    """

    engine: EngineId
    name: str
    start: float
    end: float
    cause: str


@dataclass
class DutyTotals:
    """Of an engine; what each field means, and its unit, is said in `metrics/definitions.py`."""

    role_changes: int = 0
    outages: int = 0
    draining_s: float = 0.0
    out_of_service_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Passenger(NamedTuple):
    """A sequence in a shipment.

    Attributes:
      id: of the sequence.
      engine: that prefilled it; None where the shipment is of no prefill, as in a migration.
      step: number of the step there that the shipment left with, or that was the last before.
      target: the engine that it decodes on; None where its KV is given back to a prefix cache.
    """

    id: str
    engine: EngineId | None
    step: int
    target: EngineId | None


class Shipment(NamedTuple):
    """A transfer job: pages of some layers of one sequence or several, which moved together.

    Attributes:
      id: of the job.
      source, target: the pools.
      layers: global layers.
      bytes, pages: over the wire, padding included; of the source that are of a sequence.
      sent: given to the transport; with a step whose layers it waits for, at the step's dispatch.
      on_wire: its pages had been read.
      arrived: every piece was at the target.
      written: its pages were in the target's pool; None where they were not wanted any more.
      passengers: whose KV it was.
    """

    id: int
    source: PoolId
    target: PoolId
    layers: range
    bytes: int
    pages: int
    sent: float
    on_wire: float
    arrived: float
    written: float | None
    passengers: tuple[Passenger, ...]

    @property
    def end(self) -> float:
        """When nothing more was done for it."""
        return self.arrived if self.written is None else self.written


class FreePages(NamedTuple):
    """How many pages of a pool could be allocated at a moment."""

    pool: PoolId
    moment: float
    pages: int


@dataclass
class EngineMetrics:
    """The work of one engine so far.

    Attributes:
      steps: spans recorded.
      busy_seconds: time covered by at least one of them.
      sums: their counts, added up.
    """

    steps: int = 0
    busy_seconds: float = 0.0
    sums: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _last_end: float = float("-inf")

    def add(self, span: Span) -> None:
        """Count one more span; spans of a track come in the order of their ends."""
        self.steps += 1
        # With lookahead a step is dispatched before its predecessor has ended: count that once.
        begun = max(span.start, self._last_end)
        if span.end > begun:
            self.busy_seconds += span.end - begun
            self._last_end = span.end
        sums = self.sums
        for name, value in span.args.items():
            sums[name] += value

    @property
    def occupancy(self) -> float | None:
        """Mean share of rows that were active in a tick; None on a track without rows."""
        rows = self.sums.get("rows", 0)
        return self.sums["rows_active"] / rows if rows else None

    @property
    def bubble_share(self) -> float | None:
        """Stage-ticks without an active row / all stage-ticks; None on a track without stages.

        Each tick dispatched runs every stage once. A stage whose microbatch has no active row does
        useless work, or waits for one: a bubble. Time in which nothing was dispatched is not
        counted.
        """
        stages = self.sums.get("stages", 0)
        return 1 - self.sums["stages_active"] / stages if stages else None

    def to_json(self) -> dict[str, Any]:
        """Plain values under the keys of `definitions.ENGINE`."""
        return {
            "steps": self.steps,
            "busy_seconds": self.busy_seconds,
            "occupancy": self.occupancy,
            "bubble_share": self.bubble_share,
            "sums": dict(self.sums),
        }
