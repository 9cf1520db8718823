"""A run as it is shown: steps side by side, shipments, the way of each sequence's KV, counters.

Worked out from what a recorder holds; the trace and the pictures show it. Moments are seconds on
the run's clock.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import RequestMetrics, phases
from pdjax.host.metrics.work import Duty, Passenger, Shipment, Span


class Step(NamedTuple):
    """A step as it is shown. An engine runs its steps one after the other, but with lookahead a
    step is dispatched before its predecessor has ended: it is shown from that end on."""

    span: Span
    start: float

    @property
    def end(self) -> float:
        """When its outcome was read."""
        return self.span.end

    @property
    def ahead(self) -> float:
        """Seconds that it was dispatched before it is shown."""
        return self.start - self.span.start


class KVFlow(NamedTuple):
    """The way of a sequence's KV: from a prefill step, by a shipment, to the first tick after it.

    Attributes:
      sequence: its id.
      step: that the shipment left with, or that was the sequence's last before; None where there is
        none, as in a migration, or where it is not kept any more.
      shipment: what carried it.
      tick: in which the sequence decodes first with it; None where it never did.
    """

    sequence: str
    step: Step | None
    shipment: Shipment
    tick: Step | None


class Counter(NamedTuple):
    """A number over time.

    Attributes:
      name, unit: what is counted: "hbm/prefill-0 free" in "pages".
      values: (moment, value), in order; a value holds until the next one.
    """

    name: str
    unit: str
    values: list[tuple[float, int]]


@dataclass(frozen=True)
class Timeline:
    """What a recorder holds.

    Attributes:
      start, end: first and last moment.
      steps: of each engine, by its name, in order and side by side.
      shipments: in the order in which they were sent.
      requests: in the order of their arrival, with those that have not ended.
      flows: in the order of their shipments.
      counters: free pages of pools, bytes on the way of links, sequences.
      duties: when engines drained or were out of service, within that time.
    """

    start: float
    end: float
    steps: dict[str, list[Step]]
    shipments: list[Shipment]
    requests: list[RequestMetrics]
    flows: list[KVFlow]
    counters: list[Counter]
    duties: list[Duty]

    @classmethod
    def of(cls, recorder: Recorder) -> "Timeline":
        """What `recorder` holds now."""
        requests = sorted([*recorder.requests(), *recorder.unfinished()], key=lambda m: m.arrival)
        shipments = sorted(recorder.shipments(), key=lambda each: (each.sent, each.id))
        by_track: dict[str, list[Span]] = {}
        for span in recorder.spans():
            by_track.setdefault(span.track, []).append(span)
        steps = {track: _in_turn(spans) for track, spans in sorted(by_track.items())}
        counters = [*_free_pages(recorder), *_in_flight(shipments), *_sequences(requests)]
        moments = [each.values[0][0] for each in counters]
        moments += [track[0].span.start for track in steps.values()]
        last = [each.values[-1][0] for each in counters]
        last += [track[-1].end for track in steps.values()]
        last += [each.end for each in shipments]
        last += [each.token_times[-1] for each in requests if each.token_times]
        # An engine that has done little beside others may have no step left that is kept.
        totals = list(recorder.engines.items())
        whole = {name for name, work in totals if work.steps == len(steps.get(name, ()))}
        flows = list(_flows(steps, whole, shipments, requests))
        start, end = min(moments, default=0.0), max(last, default=0.0)
        duties = [each for each in recorder.all_duties() if start <= each.start and each.end <= end]
        return cls(start, end, steps, shipments, requests, flows, counters, duties)


def _in_turn(spans: list[Span]) -> list[Step]:
    shown, last_end = list[Step](), float("-inf")
    for span in sorted(spans, key=lambda span: (span.end, span.start)):
        shown.append(Step(span, min(max(span.start, last_end), span.end)))
        last_end = span.end
    return shown


# Where KV comes from and goes to.


def _flows(
    steps: dict[str, list[Step]],
    whole: Collection[str],
    shipments: list[Shipment],
    requests: list[RequestMetrics],
) -> Iterator[KVFlow]:
    """The flow of each sequence in each shipment, but for KV that is given back to a cache; `whole`
    are the engines all of whose steps are kept."""
    numbered: dict[tuple[str, int], list[Step]] = {}
    for track, its_steps in steps.items():
        for each in its_steps:
            if each.span.number:
                numbered.setdefault((track, each.span.number), []).append(each)
    ticks = {
        track: [each for each in its_steps if not each.span.number]
        for track, its_steps in steps.items()
    }
    turns = _turns(requests)
    for shipment in shipments:
        for seq in shipment.passengers:
            if seq.target is not None:
                step = _step(numbered, seq, shipment)
                its_turns, its_ticks = turns.get(seq.id, []), ticks.get(seq.target, [])
                tick = _first_tick(its_ticks, its_turns, seq.id, shipment)
                if its_ticks and tick is its_ticks[0] and seq.target not in whole:
                    tick = None  # it may have been one of those that are not kept any more
                yield KVFlow(seq.id, step, shipment, tick)


def _turns(requests: Iterable[RequestMetrics]) -> dict[str, list[tuple[float, str]]]:
    """By sequence, when it first decoded with what it had, and when that was over; in order."""
    turns: dict[str, list[tuple[float, str]]] = {}
    for metrics in requests:
        turns.setdefault(metrics.id, []).extend(
            (moment, name)
            for name, moment in metrics.marks
            if name in ("first_tick", "preempted", "finished")
        )
    return turns


def _step(
    numbered: dict[tuple[str, int], list[Step]], passenger: Passenger, shipment: Shipment
) -> Step | None:
    """The step that a passenger left with: the last of its number that was dispatched before, since
    numbers begin anew after a broken turn. It may not be on record."""
    if passenger.engine is None:
        return None
    alike = numbered.get((passenger.engine, passenger.step), [])
    before = [
        step for step in alike if step.span.start <= shipment.sent and step.span.names(passenger.id)
    ]
    return before[-1] if before else None


def _first_tick(
    ticks: Sequence[Step], turns: list[tuple[float, str]], name: str, shipment: Shipment
) -> Step | None:
    """The first tick of a sequence after a shipment was sent; None where that failed. It may have
    been dispatched before the host saw the arrival. Where time stands still, as between events of a
    simulation, several may have been dispatched at its moment."""
    at = bisect_left(turns, (shipment.sent, ""))
    if at == len(turns) or turns[at][1] != "first_tick":
        return None
    moment = turns[at][0]
    nth = bisect_left(ticks, moment, key=lambda step: step.span.start)
    while nth < len(ticks) and ticks[nth].span.start == moment and not ticks[nth].span.names(name):
        nth += 1
    return ticks[nth] if nth < len(ticks) and ticks[nth].span.names(name) else None


# Counters.


def _free_pages(recorder: Recorder) -> Iterator[Counter]:
    values: dict[str, list[tuple[float, int]]] = {}
    for pool, moment, pages in recorder.pages():
        values.setdefault(str(pool), []).append((moment, pages))
    for name, its_values in sorted(values.items()):
        yield Counter(f"{name} free", "pages", its_values)


def _in_flight(shipments: list[Shipment]) -> Iterator[Counter]:
    """Bytes that have been sent and have not arrived, by link."""
    changes: dict[str, list[tuple[float, int]]] = {}
    for each in shipments:
        its_changes = changes.setdefault(f"{each.source}->{each.target}", [])
        its_changes += [(each.sent, each.bytes), (each.arrived, -each.bytes)]
    for name, its_changes in sorted(changes.items()):
        yield Counter(f"{name} in flight", "bytes", _added_up(its_changes))


def _sequences(requests: list[RequestMetrics]) -> Iterator[Counter]:
    """Sequences that wait for their prefill, and that are past it."""
    waiting, running = list[tuple[float, int]](), list[tuple[float, int]]()
    for metrics in requests:
        for name, start, end in phases(metrics):
            changes = waiting if name == "queue" else running
            changes += [(start, 1), (end, -1)]
    for name, changes in (("waiting", waiting), ("running", running)):
        if changes:
            yield Counter(name, "sequences", _added_up(changes))


def _added_up(changes: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """The values after changes, once a moment."""
    values, total = list[tuple[float, int]](), 0
    for moment, change in sorted(changes):
        total += change
        if values and values[-1][0] == moment:
            values[-1] = moment, total
        else:
            values.append((moment, total))
    return values


def lanes(shipments: Iterable[Shipment]) -> dict[str, list[list[Shipment]]]:
    """The shipments of each link, dealt out to as few lanes as keep them apart."""
    links: dict[str, list[list[Shipment]]] = {}
    for each in sorted(shipments, key=lambda each: each.sent):
        its_lanes = links.setdefault(f"{each.source}->{each.target}", [])
        free = next((lane for lane in its_lanes if lane[-1].end <= each.sent), None)
        if free is None:
            its_lanes.append([each])
        else:
            free.append(each)
    return dict(sorted(links.items()))
