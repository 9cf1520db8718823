"""Times a hand-off by the clock of the sending device, from a trace of the profiler: the host sees
arrivals late, and only between other work.

Each trace has one plain put and then one served prompt, each after a rest: a link that has rested
for some 50 ms takes a while to wake up, and this way both pay for it.
"""

import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from experiments.common.kernel_profile import trace

GATHER = "jit_gather"
"""The program that reads pages, see `pdjax/device/kv/transfer_path.py`."""

REST = 0.1
"""Seconds of rest before the put, and before the prompt is submitted."""


@dataclass(frozen=True)
class Traced:
    """A plain put on one link, and a hand-off by the clock of the sending device; milliseconds. Of
    several devices it is the one with the slowest copies.

    Attributes:
      put_bytes, put_ms: bytes and time of the plain put.
      nbytes: bytes of the hand-off's copies.
      copy_ms: time in which any copy ran.
      gather_ms: time of the kernels that read its pages.
      wait_ms: time in which the link was idle although pages had been read: for each copy, from the
        end of the last gather, or of the copy before if that was later, to its start.
      behind_ms: time from the end of the last kernel before the last gather, which is the prefill's
        unless the gather came late, to the end of the last copy. The first token is chosen
        meanwhile.
      traces: number of traces; all times are medians over them.
    """

    put_bytes: float
    put_ms: float
    nbytes: float
    copy_ms: float
    gather_ms: float
    wait_ms: float
    behind_ms: float
    traces: int = 1

    @property
    def of_put(self) -> float:
        """The copies' rate, as a share of the plain put's."""
        return self._share(self.copy_ms)

    @property
    def of_put_in_all(self) -> float:
        """The rate including the time of gathers and waits, as a share of the plain put's."""
        return self._share(self.gather_ms + self.wait_ms + self.copy_ms)

    def _share(self, ms: float) -> float:
        return self.nbytes / ms / (self.put_bytes / self.put_ms)


class _Event(NamedTuple):
    """An event on a stream of a device, ns: a kernel of program `module`, or a copy of `copied`
    bytes to another device."""

    begin: float
    end: float
    module: str
    copied: int


def traced(put: Callable[[], object], serve: Callable[[], object], rounds: int) -> Traced | None:
    """Trace `put`, a plain put, and then `serve`, which hands a prompt over; return the medians of
    `rounds` traces, or None where the profiler sees no copies between devices."""

    def both() -> None:
        for act in (put, serve):
            time.sleep(REST)
            act()

    seen = [asdict(one) for _ in range(rounds) if (one := read(trace(both))) is not None]
    if not seen:
        return None
    medians = Traced(**{key: statistics.median(one[key] for one in seen) for key in seen[0]})
    return replace(medians, traces=len(seen))


def read(planes: Iterable[Any]) -> Traced | None:
    """Read one trace; None if it has no plain put between devices, or no hand-off."""
    puts, sent = list[_Event](), list[Traced]()
    for plane in planes:
        events = sorted(_events(plane)) if plane.name.startswith("/device:") else []
        copies = [event for event in events if event.copied]
        gathered = min((event.end for event in events if event.module == GATHER), default=None)
        if gathered is None:
            puts += copies
        else:
            puts += [copy for copy in copies if copy.begin < gathered]
            if copies := [copy for copy in copies if copy.begin >= gathered]:
                sent.append(_sent(events, copies))
    if not puts or not sent:
        return None
    slowest = min(sent, key=lambda one: one.nbytes / one.copy_ms)
    return replace(
        slowest, put_bytes=sum(put.copied for put in puts), put_ms=_busy(sorted(puts)) / 1e6
    )


def _sent(events: list[_Event], copies: list[_Event]) -> Traced:
    """Evaluate a hand-off from a device's events and its copies to others after a first gather."""
    kernels = [event for event in events if event.module and event.end <= copies[-1].begin]
    runs = [list(run) for _, run in itertools.groupby(kernels, lambda each: each.module == GATHER)]
    last = max(i for i, run in enumerate(runs) if run[0].module == GATHER)
    before = runs[last - 1][-1].end if last else runs[last][0].begin
    gathers = [event for event in events if event.module == GATHER]
    waited = idle_since = 0.0
    for copy in copies:
        gathered = max(gather.end for gather in gathers if gather.end <= copy.begin)
        waited += max(0.0, copy.begin - max(gathered, idle_since))
        idle_since = max(idle_since, copy.end)
    return Traced(
        put_bytes=0.0,
        put_ms=0.0,
        nbytes=sum(copy.copied for copy in copies),
        copy_ms=_busy(copies) / 1e6,
        gather_ms=_busy(gathers) / 1e6,
        wait_ms=waited / 1e6,
        behind_ms=(idle_since - before) / 1e6,
    )


def _busy(events: Iterable[_Event]) -> float:
    """Return the time in which any event ran, ns; events are in the order of their starts."""
    busy = until = 0.0
    for event in events:
        busy += max(0.0, event.end - max(event.begin, until))
        until = max(until, event.end)
    return busy


def _events(plane: Any) -> Iterator[_Event]:
    for line in plane.lines:
        if "Stream" not in line.name:
            continue
        for event in line.events:
            stats = dict(event.stats)
            copied = 0
            if event.name == "MemcpyP2P":
                [size] = re.findall(r"size:(\d+)", stats["memcpy_details"])
                copied = int(size)
            end = event.start_ns + event.duration_ns
            yield _Event(event.start_ns, end, stats.get("hlo_module", ""), copied)
