"""A run as Chrome trace events, for Perfetto (ui.perfetto.dev) and chrome://tracing.

Four processes on one clock that begins at 0: the engines, with a track for each; the wires, with a
slice for each shipment; the requests, with a row for each sequence that shows what it was doing and
when its tokens came; and counters. Where engines drained or were out of service a fifth one shows
that. An arrow leads from the prefill step that computed KV by the
wire to the tick in which its sequence first decodes. The format is the "Trace Event Format" of
Chromium's tracing project, as Perfetto reads it: slices of a track nest, a flow event belongs to
the innermost slice of its track at its moment.
"""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from pdjax.formats.strict_json import dumps
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import RequestMetrics, phases
from pdjax.host.metrics.timeline import Counter, KVFlow, Step, Timeline, lanes
from pdjax.host.metrics.work import Shipment

ENGINES, WIRES, REQUESTS, COUNTERS, DUTIES = 1, 2, 3, 4, 5
"""Process ids of the groups of tracks, in the order in which they are shown."""

_GROUPS = {
    ENGINES: "engines",
    WIRES: "wires (KV between pools)",
    REQUESTS: "requests",
    COUNTERS: "counters",
    DUTIES: "roles (engines that drain or are out of service)",
}
_FIRST_THREAD = 10
"""Ids of tracks begin here: a track with the id of a process would be taken for its main thread."""

Event = dict[str, Any]


def write_trace(path: str | Path, recorder: Recorder) -> None:
    """Write what `recorder` holds to `path`, as JSON; the folder is made where it is missing.

    An event is written as soon as it is made: all of them would take some hundred times the memory
    of the moments that they show.
    """
    timeline = Timeline.of(recorder)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        for number, event in enumerate(trace_events(timeline)):
            file.write((",\n" if number else "\n") + dumps(event))
        other = dumps({"clock_at_0_s": timeline.start})
        file.write(f'\n], "otherData": {other}}}\n')


def trace_events(timeline: Timeline) -> Iterator[Event]:
    """The events of a run; `ts` and `dur` are microseconds from the first moment on."""
    return _Trace(timeline).events()


class _Trace:
    """Makes the events of a timeline."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._threads: Iterator[int] = count(_FIRST_THREAD)
        self._track_of: dict[str, int] = {}  # of an engine
        self._wire_of: dict[int, int] = {}  # of a shipment, by its id

    def events(self) -> Iterator[Event]:
        """All of them; a slice comes before what is bound to it, also at the same moment."""
        for process, name in _GROUPS.items():
            if process == DUTIES and not self._timeline.duties:
                continue
            yield _metadata(process, process, "process_name", name=name)
            yield _metadata(process, process, "process_sort_index", sort_index=process)
        for track, steps in self._timeline.steps.items():
            thread = self._track_of[track] = next(self._threads)
            yield from _names(ENGINES, thread, track)
            yield from (self._step(thread, step) for step in steps)
        for link, its_lanes in lanes(self._timeline.shipments).items():
            for number, lane in enumerate(its_lanes, start=1):
                thread = next(self._threads)
                yield from _names(WIRES, thread, link if number == 1 else f"{link} ({number})")
                for shipment in lane:
                    self._wire_of[shipment.id] = thread
                    yield from self._shipment(thread, shipment)
        for number, flow in enumerate(self._timeline.flows, start=1):
            yield from self._flow(number, flow)
        for number, metrics in enumerate(self._timeline.requests, start=1):
            yield from self._life(number, metrics)
        for counter in self._timeline.counters:
            yield from self._counter(counter)
        yield from self._duties()

    def _ns(self, moment: float) -> int:
        return round((moment - self._timeline.start) * 1e9)

    def _slice(
        self, process: int, thread: int, name: str, start: float, end: float, **args: Any
    ) -> Event:
        begin = self._ns(start)
        timed: Event = {"dur": max(0, self._ns(end) - begin) / 1e3, "args": args}
        return _event("X", process, thread, name, begin) | timed

    def _step(self, thread: int, step: Step) -> Event:
        """`ahead_us`: how much earlier than it is shown it was dispatched."""
        span = step.span
        name = f"prefill {span.number}" if span.number else span.name
        args: dict[str, Any] = {**span.args, "ahead_us": round(step.ahead * 1e6, 3)}
        if span.who:
            args["who"] = span.who
        return self._slice(ENGINES, thread, name, step.start, step.end, **args)

    def _shipment(self, thread: int, shipment: Shipment) -> Iterator[Event]:
        """The whole way, and in it the parts that took any time."""
        on_wire = shipment.arrived - shipment.on_wire
        args: dict[str, Any] = {
            "job": shipment.id,
            "bytes": shipment.bytes,
            "pages": shipment.pages,
            "GB_per_s": round(shipment.bytes / on_wire / 1e9, 3) if on_wire > 0 else None,
            "who": ", ".join(each.id for each in shipment.passengers),
        }
        if shipment.written is None:
            args["dropped"] = True
        name = shipment_name(shipment)
        yield self._slice(WIRES, thread, name, shipment.sent, shipment.end, **args)
        for part, start, end in shipment_parts(shipment):
            if self._ns(end) > self._ns(start):
                yield self._slice(WIRES, thread, part, start, end)

    def _duties(self) -> Iterator[Event]:
        """A track for each engine that has drained or been out of service."""
        threads: dict[str, int] = {}
        for duty in self._timeline.duties:
            if duty.engine not in threads:
                threads[duty.engine] = next(self._threads)
                yield from _names(DUTIES, threads[duty.engine], duty.engine)
            thread = threads[duty.engine]
            yield self._slice(DUTIES, thread, duty.name, duty.start, duty.end, cause=duty.cause)

    def _flow(self, number: int, flow: KVFlow) -> Iterator[Event]:
        """Arrows; a way of which one end alone is known has none.

        The events of a flow have to come in its order. With lookahead a step is shown late, perhaps
        later than the host saw that its shipment had arrived: then no arrow leads from it. A tick
        that runs ahead begins before the host sees that: then the arrow leaves the wire earlier.
        """
        shipment, ends = flow.shipment, list[tuple[int, int, int]]()
        on_wire, arrived = self._ns(shipment.on_wire), self._ns(shipment.arrived)
        at, last = on_wire, arrived - 1  # at its end it would be the next one's
        if on_wire == arrived:
            at, last = self._ns(shipment.sent), arrived
        if flow.step is not None:
            begin, end = self._ns(flow.step.start), self._ns(flow.step.end)
            left = max(begin, min(on_wire, end - 1))
            if left <= last:
                ends.append((ENGINES, self._track_of[flow.step.span.track], left))
                at = max(at, left)
        begins = None if flow.tick is None else self._ns(flow.tick.start)
        earliest = max([self._ns(shipment.sent), *(ns for *_, ns in ends)])
        if begins is not None and earliest <= begins:
            at = min(at, begins)
        ends.append((WIRES, self._wire_of[shipment.id], at))
        if flow.tick is not None and begins is not None and at <= begins:
            ends.append((ENGINES, self._track_of[flow.tick.span.track], begins))
        for kind, (process, thread, ns) in zip(_KINDS[len(ends)], ends, strict=False):
            event = _event(kind, process, thread, "KV", ns) | {"cat": "kv", "id": number}
            yield event | {"bp": "e"} if kind == "f" else event

    def _life(self, number: int, metrics: RequestMetrics) -> Iterator[Event]:
        """Phases and tokens of one sequence, on a row of its own that bears its id."""
        its_phases = phases(metrics)
        if not its_phases:
            return
        common: Event = {"cat": "request", "id": number}
        whole: dict[str, Any] = {
            key: value
            for key, value in metrics.to_json().items()
            if key not in ("id", "itls_ms", "transfer", "arrival_s")
        }
        events = [("b", metrics.id, its_phases[0].start, whole)]
        for name, start, end in its_phases:
            events += [("b", name, start, {}), ("e", name, end, {})]
        events.append(("e", metrics.id, its_phases[-1].end, {}))
        marks = [(f"token {n}", moment) for n, moment in enumerate(metrics.token_times)]
        marks += [(name, at) for name, at in metrics.marks if name in _SHOWN]
        last = its_phases[-1].end
        events[1:1] = [("n", name, min(moment, last), {}) for name, moment in marks]
        # Of one moment, tokens come first, then what ends there, then what begins.
        for kind, name, moment, args in sorted(events, key=lambda each: each[2]):
            event = _event(kind, REQUESTS, REQUESTS, name, self._ns(moment)) | common
            yield event | {"args": args} if args else event

    def _counter(self, counter: Counter) -> Iterator[Event]:
        for moment, value in counter.values:
            event = _event("C", COUNTERS, COUNTERS, counter.name, self._ns(moment))
            yield event | {"args": {counter.unit: value}}


_KINDS = {1: "", 2: "sf", 3: "stf"}
"""Kinds of the flow events of a way with so many ends."""

_SHOWN = ("reserved", "sent", "transfer_landed", "preempted")


def shipment_name(shipment: Shipment) -> str:
    """Which layers, and whose: "layers 0-15 of a#0 and 2 more"."""
    layers, who = shipment.layers, shipment.passengers
    first = f"layer {layers.start}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
    more = f" and {len(who) - 1} more" if len(who) > 1 else ""
    return f"{first} of {who[0].id}{more}" if who else first


def shipment_parts(shipment: Shipment) -> Iterator[tuple[str, float, float]]:
    """Name, start and end of each part of its way."""
    yield "gather", shipment.sent, shipment.on_wire
    yield "wire", shipment.on_wire, shipment.arrived
    if shipment.written is not None:
        yield "scatter", shipment.arrived, shipment.written


def _event(kind: str, process: int, thread: int, name: str, ns: int) -> Event:
    return {"ph": kind, "pid": process, "tid": thread, "name": name, "ts": ns / 1e3}


def _names(process: int, thread: int, name: str) -> Iterator[Event]:
    """A track's name; tracks are shown in the order of their ids."""
    yield _metadata(process, thread, "thread_name", name=name)
    yield _metadata(process, thread, "thread_sort_index", sort_index=thread)


def _metadata(process: int, thread: int, kind: str, **args: Any) -> Event:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": args}
