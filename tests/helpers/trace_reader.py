"""Reads a trace as Perfetto's trace processor reads JSON, into tables of its names, to be asked in
SQL.

The trace processor itself can't be had from a package index: the `perfetto` wheel fetches the
program over the network when it is first used. So these are its rules, from its importer and its
documents, as far as they concern what `host/metrics/trace.py` writes:

* Events are taken in the order of `ts`; those of one moment in the order of the file. Times are
  microseconds and become whole nanoseconds.
* X: a slice on the track of its thread. The slices of a track nest: one that begins within another
  and ends after it is dropped ("slice_drop_overlapping_complete_event"). Before a slice begins,
  those that have ended by then leave the track's stack.
* b, e, n: slices of a track that the process, `cat` and `id` name; the track bears the name of its
  first event. An `e` ends the innermost open slice of its name; without one it is
  lost ("misplaced_end_event").
* s, t, f: belong to the innermost slice on the stack of their thread's track; without one they are
  lost ("flow_no_enclosing_slice"). Only `f` with `"bp": "e"`; without it, it belongs to the next
  slice. `cat`, `name` and `id` say which flow it is; it must have begun, and once. A row of `flow`
  leads from the earlier of two slices to the later one.
* C: a value of each argument, on a counter track of the process, named by event and argument.
* M: names of processes and threads.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any

_SCHEMA = """
create table process(upid integer primary key, name text);
create table thread(utid integer primary key, upid integer, name text);
create table thread_track(id integer primary key, utid integer);
create table process_track(id integer primary key, upid integer, name text);
create table counter_track(id integer primary key, upid integer, name text);
create table slice(id integer primary key, ts integer, dur integer, track_id integer,
                   category text, name text, depth integer, parent_id integer, args text);
create table flow(slice_out integer, slice_in integer);
create table counter(ts integer, track_id integer, value real);
create table stats(name text);
"""

_PENDING = -1


def read_trace(path: Path) -> sqlite3.Connection:
    """The tables of a trace. `stats` has a row for each event that could not be taken."""
    return _Reader(json.loads(path.read_text("utf-8"))).tables


def ns(microseconds: float) -> int:
    nanoseconds = microseconds * 1e3
    assert abs(nanoseconds - round(nanoseconds)) < 1e-3, f"{microseconds} us is no whole ns"
    return round(nanoseconds)


class _Reader:
    def __init__(self, trace: dict[str, Any]) -> None:
        self.tables = sqlite3.connect(":memory:")
        self.tables.executescript(_SCHEMA)
        self._tracks: dict[tuple, int] = {}
        self._stacks: dict[int, list[int]] = {}
        self._slices: dict[int, list[Any]] = {}  # ts, dur, name
        self._flows: dict[tuple, int] = {}
        for event in sorted(trace["traceEvents"], key=lambda event: event.get("ts", -1)):
            getattr(self, f"_{event['ph']}")(event)
        rows = ((dur, id) for id, (_, dur, _) in self._slices.items())
        self.tables.executemany("update slice set dur = ? where id = ?", rows)

    def _add(self, table: str, *values: Any) -> int:
        marks = ", ".join("?" * len(values))
        row = self.tables.execute(f"insert into {table} values ({marks})", values)
        assert row.lastrowid is not None
        return row.lastrowid

    def _lost(self, why: str) -> None:
        self._add("stats", why)

    def _M(self, event: dict) -> None:
        if event["name"] == "process_name":
            self._add("process", event["pid"], event["args"]["name"])
        elif event["name"] == "thread_name":
            assert event["tid"] != event["pid"], "would be the main thread"
            self._add("thread", event["tid"], event["pid"], event["args"]["name"])

    def _track(self, table: str, key: tuple, *values: Any) -> int:
        full = (table, *key)
        if full not in self._tracks:
            self._tracks[full] = len(self._tracks) + 1
            self._add(table, self._tracks[full], *values)
        return self._tracks[full]

    def _thread_track(self, event: dict) -> int:
        return self._track("thread_track", (event["pid"], event["tid"]), event["tid"])

    def _begin(self, event: dict, track: int, dur: int) -> None:
        ts, stack = ns(event["ts"]), self._stacks.setdefault(track, [])
        for id in reversed(stack[:]):
            began, its_dur, _ = self._slices[id]
            if its_dur == _PENDING:
                continue
            end = began + its_dur
            if end < ts or (end == ts and not (its_dur == 0 and dur == 0)):
                assert stack[-1] == id, "an open slice lies within one that has ended"
                stack.pop()
            elif dur != _PENDING and ts + dur > end:
                self._lost("slice_drop_overlapping_complete_event")
                return
        parent = stack[-1] if stack else None
        args = json.dumps(event.get("args", {}))
        values = ts, dur, track, event.get("cat"), event["name"], len(stack), parent, args
        id = self._add("slice", None, *values)
        self._slices[id] = [ts, dur, event["name"]]
        stack.append(id)

    def _X(self, event: dict) -> None:
        assert event["dur"] >= 0
        self._begin(event, self._thread_track(event), ns(event["dur"]))

    def _async_track(self, event: dict) -> int:
        key = event["pid"], event["cat"], event["id"]
        return self._track("process_track", key, event["pid"], event["name"])

    def _b(self, event: dict) -> None:
        self._begin(event, self._async_track(event), _PENDING)

    def _n(self, event: dict) -> None:
        self._begin(event, self._async_track(event), 0)

    def _e(self, event: dict) -> None:
        ts, stack = ns(event["ts"]), self._stacks.get(self._async_track(event), [])
        while stack and self._slices[stack[-1]][1] == 0:
            stack.pop()
        if not stack or self._slices[stack[-1]][2] != event["name"]:
            self._lost("misplaced_end_event")
            return
        began = self._slices[stack[-1]]
        began[1] = ts - began[0]
        stack.pop()

    def _innermost(self, event: dict) -> int | None:
        stack = self._stacks.get(self._thread_track(event), [])
        if not stack:
            self._lost("flow_no_enclosing_slice")
            return None
        began, dur, _ = self._slices[stack[-1]]
        assert ns(event["ts"]) <= began + dur, "the slice is over: only its neighbour is missing"
        return stack[-1]

    def _s(self, event: dict) -> None:
        key = event["cat"], event["name"], event["id"]
        if key in self._flows:
            self._lost("flow_duplicate_id")
        elif (at := self._innermost(event)) is not None:
            self._flows[key] = at

    def _t(self, event: dict) -> None:
        key = event["cat"], event["name"], event["id"]
        at = self._innermost(event)
        if key not in self._flows:
            self._lost("flow_step_without_start")
        elif at is not None:
            came = self._flows[key]
            self._flows[key] = at
            self._add("flow", *sorted((came, at), key=lambda id: self._slices[id][0]))

    def _f(self, event: dict) -> None:
        assert event["bp"] == "e"
        self._t(event)

    def _C(self, event: dict) -> None:
        for unit, value in event["args"].items():
            key = event["pid"], event["name"], unit
            track = self._track("counter_track", key, event["pid"], f"{event['name']} {unit}")
            self._add("counter", ns(event["ts"]), track, value)
