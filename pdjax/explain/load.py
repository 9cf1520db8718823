"""What the chips and the links of a run did, from the spans that were recorded."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from pdjax.bench.record import Played
from pdjax.core.ids import EngineId
from pdjax.host.metrics.request import PHASES, RequestMetrics, phases
from pdjax.host.metrics.work import Span
from pdjax.sim.cluster import Cluster

PREFILL, DECODE, MIXED = "prefill", "decode", "mixed"


@dataclass(frozen=True)
class Role:
    """What the engines of a role did.

    Attributes:
      name: "prefill", "decode" or "mixed".
      busy: share of the run that the steps of each engine had its chip.
      tokens: that each engine computed: of prompts, and one for each active row of a tick.
    """

    name: str
    busy: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def utilisation(self) -> float:
        """Mean of `busy`."""
        return sum(self.busy) / len(self.busy)

    @property
    def imbalance(self) -> float:
        """Tokens of the engine with the most, over their mean; 1 is even."""
        total = sum(self.tokens)
        return max(self.tokens) * len(self.tokens) / total if total else 1.0


@dataclass(frozen=True)
class Load:
    """What a run's chips and links did. Seconds a request are means over completed ones.

    Attributes:
      seconds: from the first arrival to the last token.
      roles: of the engines, by their roles.
      rows: mean number of active rows of a tick, on one engine; `most_rows`: that it has.
      tick: seconds of a tick without chunks of prompts, the median; None where there was none.
      held_up: of the time in which a chip has a sequence in a decode row, the part that its steps
        with chunks of prompts take.
      phases: seconds a request by the names of `PHASES`.
      queue_p90, row_wait_p90: seconds to the first chunk, and for a row, of one in ten.
      wire, exposed: seconds a request that KV was on the wire, and that it was waited for with a
        row held.
      moved: bytes of KV a request.
      preemptions: of all requests.
    """

    seconds: float
    roles: tuple[Role, ...]
    rows: float | None
    most_rows: int
    tick: float | None
    held_up: float
    phases: Mapping[str, float]
    queue_p90: float
    row_wait_p90: float
    wire: float
    exposed: float
    moved: float
    preemptions: int

    @classmethod
    def of(cls, cluster: Cluster, played: Played) -> "Load":
        """Of a run that a cluster has just served, all of whose spans it still has."""
        done = [r.metrics for r in played.records if r.metrics.completed]
        begin = played.start
        end = max((m.token_times[-1] for m in done), default=begin)
        chips = _by_chip(cluster)
        ticks = [turn for turns in chips.values() for turn in turns if turn.has("tick")]
        alone = [turn for turn in ticks if not turn.has("step")]
        counted = [s.args["rows_active"] for t in ticks for s in t.spans if s.name == "tick"]
        gaps = [gap for m in done if (gap := m.first_gap) is not None]
        count = max(1, len(done))
        return cls(
            seconds=end - begin,
            roles=tuple(_roles(cluster, chips, end - begin)),
            rows=float(np.mean(counted)) if counted else None,
            most_rows=cluster.config.decode.rows,
            tick=float(np.median([turn.seconds for turn in alone])) if alone else None,
            held_up=_held_up(chips, done),
            phases=_mean_phases(done),
            queue_p90=_p90(m.queue for m in done),
            row_wait_p90=_p90(gap.row_wait for gap in gaps),
            wire=sum(m.transfer.wire_s for m in done) / count,
            exposed=sum(gap.kv_wait or 0.0 for gap in gaps) / count,
            moved=sum(m.transfer.bytes for m in done) / count,
            preemptions=sum(m.preemptions for m in done),
        )

    def role(self, name: str) -> Role | None:
        """Of the engines of a role; None where there are none."""
        return next((role for role in self.roles if role.name == name), None)

    @property
    def imbalance(self) -> float:
        """The largest of the roles."""
        return max((role.imbalance for role in self.roles), default=1.0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        roles = {
            role.name: {
                **asdict(role),
                "utilisation": role.utilisation,
                "imbalance": role.imbalance,
            }
            for role in self.roles
        }
        return {**asdict(self), "phases": dict(self.phases), "roles": roles}


class Turn(NamedTuple):
    """The time that a step had a chip for itself.

    Attributes:
      start, end: a step that was dispatched while another ran has the chip from that one's end on.
      spans: of the step; a mixed one has two, of its chunks and of its rows.
    """

    start: float
    end: float
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end - self.start

    def has(self, name: str) -> bool:
        """Whether a span of this name is of it: "step" of chunks, "tick" of rows."""
        return any(span.name == name for span in self.spans)


def turns_of(spans: Iterable[Span]) -> list[Turn]:
    """The steps of one chip, one after the other, in the order of their ends."""
    found, last = list[Turn](), float("-inf")
    alike = groupby(sorted(spans, key=_when), key=_when)
    for (end, start, _), group in alike:
        found.append(Turn(min(max(start, last), end), end, tuple(group)))
        last = end
    return found


def _when(span: Span) -> tuple[float, float, str]:
    return span.end, span.start, span.track


def _by_chip(cluster: Cluster) -> dict[str, list[Turn]]:
    """The steps of each chip, by its pool."""
    spans: dict[str, list[Span]] = {engine.pool: [] for engine in cluster.engines.values()}
    for span in cluster.recorder.spans():
        spans[cluster.engines[EngineId(span.track)].pool].append(span)
    return {pool: turns_of(each) for pool, each in spans.items()}


def _roles(cluster: Cluster, chips: Mapping[str, list[Turn]], seconds: float) -> Iterable[Role]:
    for name in (PREFILL, DECODE, MIXED):
        busy, tokens = list[float](), list[int]()
        for id, engine in cluster.engines.items():
            if id.partition("/")[0] == name:
                own = [turn for turn in chips[engine.pool] if turn.spans[0].track == id]
                busy.append(sum(turn.seconds for turn in own) / seconds if seconds else 0.0)
                tokens.append(sum(_tokens(span) for turn in own for span in turn.spans))
        if busy:
            yield Role(name, tuple(busy), tuple(tokens))


def _tokens(span: Span) -> int:
    return span.args.get("tokens", 0) + span.args.get("rows_active", 0)


_IN_A_ROW = ("wait for tick", "decode")
"""Phases in which a sequence has a decode row and its KV is there."""


def _held_up(chips: Mapping[str, list[Turn]], done: Seq[RequestMetrics]) -> float:
    """Of the time in which chips had steps and a sequence in a row, the part that steps with chunks
    take."""
    decoding = {
        pool: turns for pool, turns in chips.items() if any(turn.has("tick") for turn in turns)
    }
    held = _held(decoding, done)
    whole = chunks = 0.0
    for pool, turns in decoding.items():
        for turn, seconds in zip(turns, _overlaps(turns, held[pool]), strict=True):
            whole += seconds
            chunks += seconds if turn.has("step") else 0.0
    return chunks / whole if whole else 0.0


def _held(
    chips: Mapping[str, list[Turn]], done: Seq[RequestMetrics]
) -> dict[str, list[tuple[float, float]]]:
    """When each chip had a sequence in a row: starts and ends, in order and apart. A sequence is on
    the chip whose ticks end when its tokens come."""
    ends = {pool: {t.end for t in turns if t.has("tick")} for pool, turns in chips.items()}
    found: dict[str, list[tuple[float, float]]] = {pool: [] for pool in chips}
    for metrics in done:
        for in_a_row, group in groupby(phases(metrics), lambda phase: phase.name in _IN_A_ROW):
            spent = list(group)
            start, end = spent[0].start, spent[-1].end
            tokens = [moment for moment in metrics.token_times if start < moment <= end]
            if in_a_row and tokens:
                pool = max(ends, key=lambda pool: sum(each in ends[pool] for each in tokens))
                found[pool].append((start, end))
    return {pool: _union(each) for pool, each in found.items()}


def _union(times: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times without overlap, in order."""
    found = list[tuple[float, float]]()
    for start, end in sorted(times):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def _overlaps(turns: Seq[Turn], times: Seq[tuple[float, float]]) -> Iterable[float]:
    """Seconds of each turn that lie in some times; both are in order and without overlap."""
    first = 0
    for turn in turns:
        while first < len(times) and times[first][1] <= turn.start:
            first += 1
        seconds = 0.0
        at = first
        while at < len(times) and times[at][0] < turn.end:
            start, end = times[at]
            seconds += min(end, turn.end) - max(start, turn.start)
            at += 1
        yield seconds


def _mean_phases(done: Seq[RequestMetrics]) -> dict[str, float]:
    spent = dict.fromkeys(PHASES, 0.0)
    for metrics in done:
        for name, start, end in phases(metrics):
            spent[name] += (end - start) / len(done)
    return spent


def _p90(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.percentile(known, 90)) if known else 0.0
