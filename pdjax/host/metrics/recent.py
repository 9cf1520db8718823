"""The newest requests, for a reader beside the run: what each did when, in plain values.

Latencies have the names that `definitions.py` gives them. Nothing here tells what was asked, or who
asked.
"""

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, NamedTuple

from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import RequestMetrics, phases
from pdjax.host.metrics.work import Passenger, Shipment

MOST = 64
"""Sequences that have ended, and as many that have not."""
SHIPMENTS_EACH = 16
"""Shipments that are looked through for each of them; of older ones nothing is told."""


class _Carried(NamedTuple):
    """A sequence in a shipment."""

    shipment: Shipment
    passenger: Passenger


def recent(recorder: Recorder, most: int = MOST) -> list[dict[str, Any]]:
    """The sequences that ended last and those that have run longest, in the order of arrival.

    Each has `id`, `finish_reason` (null while it runs), `age_ms` (since its arrival), `input_len`,
    `cached_len`, `output_len`, `ttft_ms`, `tpot_ms` and `preemptions`. Its `phases` have a `name`
    of `PHASES`, `start_ms` and `end_ms`; the last one of a sequence that runs ends now. Its
    `shipments` have the `engine` that prefilled it and the `target` on which it decodes, the first
    and the last of their `layers`, the `bytes` of all their passengers, `sent_ms`, `on_wire_ms`,
    `arrived_ms` and `written_ms`. Moments are milliseconds after the arrival.
    """
    now = recorder.now()
    listed = [*recorder.newest(most), *recorder.unfinished(most)]
    listed.sort(key=lambda metrics: metrics.arrival)
    carried = _carried(recorder, listed)
    return [_plain(metrics, now, carried.get(metrics.id, ())) for metrics in listed]


def _carried(recorder: Recorder, listed: Seq[RequestMetrics]) -> Mapping[str, Seq[_Carried]]:
    """The shipments of these sequences by their ids, the newest first."""
    found: dict[str, list[_Carried]] = defaultdict(list)
    if listed:
        names, since = {metrics.id for metrics in listed}, listed[0].arrival
        for shipment in recorder.shipments()[: -SHIPMENTS_EACH * len(listed) - 1 : -1]:
            if shipment.end < since:
                break
            for passenger in shipment.passengers:
                if passenger.id in names:
                    found[passenger.id].append(_Carried(shipment, passenger))
    return found


def _plain(metrics: RequestMetrics, now: float, carried: Seq[_Carried]) -> dict[str, Any]:
    def after(moment: float | None) -> float | None:
        return None if moment is None else _rounded(moment - metrics.arrival)

    shown = metrics
    if metrics.finish_reason is None:
        shown = replace(metrics, marks=(*metrics.marks, ("finished", now)))
    return {
        "id": metrics.id,
        "finish_reason": metrics.finish_reason,
        "age_ms": after(now),
        "input_len": metrics.prompt_tokens,
        "cached_len": metrics.cached_tokens,
        "output_len": metrics.output_tokens,
        "ttft_ms": _rounded(metrics.ttft),
        "tpot_ms": _rounded(metrics.tpot),
        "preemptions": metrics.preemptions,
        "phases": [
            {"name": phase.name, "start_ms": after(phase.start), "end_ms": after(phase.end)}
            for phase in phases(shown)
        ],
        "shipments": [
            {
                "engine": passenger.engine,
                "target": passenger.target,
                "layers": [shipment.layers.start, shipment.layers.stop - 1],
                "bytes": shipment.bytes,
                "sent_ms": after(shipment.sent),
                "on_wire_ms": after(shipment.on_wire),
                "arrived_ms": after(shipment.arrived),
                "written_ms": after(shipment.written),
            }
            for shipment, passenger in reversed(carried)
        ],
    }


def _rounded(seconds: float | None) -> float | None:
    """In milliseconds, to the microsecond."""
    return None if seconds is None else round(seconds * 1e3, 3)
