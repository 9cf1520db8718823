"""Records: a record says what became of one request of a workload. All backends share its form."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from pdjax.core.slo import SLO
from pdjax.host.handoff.accounting import TransferTotals
from pdjax.host.metrics.request import RequestMetrics, in_ms
from pdjax.workloads.arrival import Arrival
from pdjax.workloads.schedule import Call


@dataclass(frozen=True)
class Record:
    """A request that has ended, or that never came.

    Attributes:
      number: in the workload. arrival: what it was there.
      metrics: what happened to it; it arrives when it was due.
      sent: when it was sent, on the clock of `metrics`; None where it was not. A request to a
        server is sent when its connection is asked for, whether or not one is opened.
      error: why it failed or was shed.
    """

    number: int
    arrival: Arrival
    metrics: RequestMetrics
    sent: float | None
    error: str | None = None

    def slo(self, usual: SLO | None) -> SLO | None:
        """What makes it good: the bounds that it came with, else the usual ones."""
        return usual if self.arrival.slo is None else self.arrival.slo.over(usual)


@dataclass(frozen=True)
class Played:
    """A workload that was played.

    Attributes:
      start: moment of its start, on the clock of the records.
      unix_start_ns: the same moment, nanoseconds since 1970; of a simulation, since the zero of
        its virtual clock.
      records: one a request, in the order of the workload.
      work: engines, transfers and links under the keys of a report, of the time of this workload;
        empty for a server at a URL, which does not tell them.
      knows_cache: whether the records say how much of a prompt was found in a prefix cache.
    """

    start: float
    unix_start_ns: int
    records: Seq[Record]
    work: Mapping[str, Any]
    knows_cache: bool = True


def ended_badly(
    number: int, arrival: Arrival, due: float, sent: float | None, reason: str, error: str
) -> Record:
    """The record of a request of which there are no metrics; `reason`: error or shed."""
    metrics = RequestMetrics(
        arrival.name(number), due, (), (), arrival.prompt, 0, TransferTotals(), reason
    )
    return Record(number, arrival, metrics, sent, error)


def never_came(lost: Seq[tuple[int, Arrival]], call: Call, moment: float) -> list[Record]:
    """The records of those that would have come after a request that has not ended well."""
    error = f"never sent: {call.id}, which it was to come after, has not ended well"
    return [ended_badly(number, each, moment, None, "error", error) for number, each in lost]


def named(arrivals: Seq[Arrival], prefix: str) -> list[Arrival]:
    """The same with names that begin with `prefix`."""
    return [
        replace(
            each,
            id=prefix + each.name(number),
            after=prefix + each.after if each.after else "",
        )
        for number, each in enumerate(arrivals)
    ]


def record_json(record: Record, played: Played, phase: str, slo: SLO | None) -> dict[str, Any]:
    """A line of the records: plain values under the keys of `definitions.REQUEST` and
    `definitions.RECORD`.

    Args:
      played: the workload that the record is of.
      phase: "warmup" or "profiling", as aiperf calls what is measured.
      slo: what makes a request good that has no bounds of its own.
    """
    metrics, arrival = record.metrics, record.arrival
    late = None if record.sent is None else record.sent - metrics.arrival
    bounds = record.slo(slo)
    good = None if bounds is None else metrics.completed and bounds.met_by(metrics)
    return {
        **metrics.to_json(),
        "number": record.number,
        "session": arrival.session,
        "turn": arrival.turn,
        "phase": phase,
        "due_s": metrics.arrival - played.start,
        "late_ms": in_ms(late),
        "error": record.error,
        "slo": slo_json(bounds),
        "good": good,
        **_as_aiperf(record, played, phase),
    }


def slo_json(slo: SLO | None) -> dict[str, float | None] | None:
    """Bounds by name, in milliseconds."""
    return None if slo is None else {name: in_ms(most) for name, most in asdict(slo).items()}


def _as_aiperf(record: Record, played: Played, phase: str) -> dict[str, Any]:
    metrics, arrival = record.metrics, record.arrival

    def ns(moment: float | None) -> int | None:
        if moment is None:
            return None
        return played.unix_start_ns + round((moment - played.start) * 1e9)

    times = metrics.token_times
    values = {
        "time_to_first_token": (in_ms(metrics.ttft), "ms"),
        "inter_token_latency": (in_ms(metrics.tpot), "ms"),
        "request_latency": (in_ms(metrics.e2e), "ms"),
        "inter_chunk_latency": (
            [in_ms(b - a) for a, b in pairwise(times) if b > a] if len(times) > 1 else None,
            "ms",
        ),
        "input_sequence_length": (metrics.prompt_tokens, "tokens"),
        "output_sequence_length": (metrics.output_tokens or None, "tokens"),
    }
    return {
        "metadata": {
            "session_num": record.number,
            "conversation_id": arrival.session or metrics.id,
            "turn_index": arrival.turn,
            "request_start_ns": ns(record.sent),
            "request_ack_ns": ns(times[0] if times else None),
            "request_end_ns": ns(times[-1] if times else None),
            "benchmark_phase": phase,
            "was_cancelled": metrics.finish_reason == "abort",
        },
        "metrics": {
            name: {"value": value, "unit": unit}
            for name, (value, unit) in values.items()
            if value is not None
        },
    }
