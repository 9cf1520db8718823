"""A run as a picture: Chrome trace events, for Perfetto (ui.perfetto.dev) and chrome://tracing.

Two processes on one clock: the engines, with a track for each engine and each pair that hands over,
and the requests, with a track for each sequence that shows what it was doing and when its tokens
came. The format is the "Trace Event Format" of Chromium's tracing project.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pdjax.formats.strict_json import dumps
from pdjax.host.metrics.recorder import Recorder, RequestMetrics, Span

ENGINES, REQUESTS = 1, 2
"""Process ids of the two groups of tracks."""

_PHASE_AFTER = {
    "arrived": "queue",
    "prefill_started": "prefill",
    "first_token": "wait for hand-off",
    "transfer_started": "transfer",
    "transfer_landed": "decode",
    "decoding": "decode",
    "preempted": "queue",
    "finished": None,
}
"""What a sequence does from a mark on. "admitted" is a moment within the queue."""

Event = dict[str, Any]


def write_trace(path: str | Path, recorder: Recorder) -> None:
    """Write what `recorder` holds to `path`, as JSON; the folder is made where it is missing.

    An event is written as soon as it is made: all of them would take some hundred times the memory
    of the moments that they show.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        for number, event in enumerate(_events(recorder.requests(), recorder.spans())):
            file.write((",\n" if number else "\n") + dumps(event))
        file.write("\n]}\n")


def trace_events(requests: Iterable[RequestMetrics], spans: Iterable[Span]) -> list[Event]:
    """The events of a run; `ts` and `dur` in microseconds of the run's clock."""
    return list(_events(requests, spans))


def _events(requests: Iterable[RequestMetrics], spans: Iterable[Span]) -> Iterator[Event]:
    yield _process_name(ENGINES, "engines")
    yield _process_name(REQUESTS, "requests")
    by_track: dict[str, list[Span]] = {}
    for span in spans:
        by_track.setdefault(span.track, []).append(span)
    thread = 0
    for track, its_spans in sorted(by_track.items()):
        lanes = _lanes(its_spans) if track.startswith("transfer/") else [_in_turn(its_spans)]
        for lane in lanes:
            thread += 1
            yield _thread_name(ENGINES, thread, track)
            yield from (_slice(ENGINES, thread, span) for span in lane)
    for thread, metrics in enumerate(requests, start=1):
        yield _thread_name(REQUESTS, thread, metrics.id)
        yield from _life(thread, metrics)


def _life(thread: int, metrics: RequestMetrics) -> list[Event]:
    """Phases and tokens of one sequence."""
    events: list[Event] = []
    for phase in phases(metrics):
        events.append(_slice(REQUESTS, thread, phase))
    for index, moment in enumerate(metrics.token_times):
        events.append(_instant(thread, f"token {index}", moment))
    events += [_instant(thread, name, at) for name, at in metrics.marks if name == "preempted"]
    return events


def phases(metrics: RequestMetrics) -> list[Span]:
    """What a sequence did, without gaps, from its arrival to its end.

    A recomputed prefill ends with a token like the first one does, even where no mark says so.
    """
    moments: list[tuple[float, str]] = [(moment, name) for name, moment in metrics.marks]
    moments += [(moment, "token") for moment in metrics.token_times]
    moments.sort(key=lambda at: at[0])  # stable: marks before the tokens of the same moment
    done: list[Span] = []
    phase: str | None = None
    since = metrics.arrival
    for moment, name in moments:
        after = _PHASE_AFTER.get(name, phase)
        if name == "token" and phase == "prefill":
            after = _PHASE_AFTER["first_token"]
        if after != phase:
            if phase is not None and moment > since:
                done.append(Span(metrics.id, phase, since, moment, {}))
            phase, since = after, moment
    return done


def _in_turn(spans: list[Span]) -> list[Span]:
    """Spans of an engine, which runs its steps one after the other.

    With lookahead a step is dispatched before its predecessor has ended; it is shown from that end
    on, and its argument `ahead_us` says how much earlier it was dispatched.
    """
    shown, last_end = [], float("-inf")
    for span in sorted(spans, key=lambda span: (span.end, span.start)):
        start = min(max(span.start, last_end), span.end)
        args = {**span.args, "ahead_us": _us(start - span.start)}
        shown.append(span._replace(start=start, args=args))
        last_end = span.end
    return shown


def _lanes(spans: list[Span]) -> list[list[Span]]:
    """Spans that may overlap, dealt out to as few tracks as keep them apart."""
    lanes: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.start):
        free = next((lane for lane in lanes if lane[-1].end <= span.start), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _slice(process: int, thread: int, span: Span) -> Event:
    return {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "name": span.name,
        "ts": _us(span.start),
        "dur": _us(span.end) - _us(span.start),
        "args": {**span.args, "who": span.who} if span.who else dict(span.args),
    }


def _instant(thread: int, name: str, moment: float) -> Event:
    return {"ph": "i", "s": "t", "pid": REQUESTS, "tid": thread, "name": name, "ts": _us(moment)}


def _process_name(process: int, name: str) -> Event:
    return {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}


def _thread_name(process: int, thread: int, name: str) -> Event:
    args = {"name": name}
    return {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": args}
