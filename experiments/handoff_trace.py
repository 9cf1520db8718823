"""How the bytes of a hand-off move by the clock of the device that sends them, from a trace of the
profiler: the host sees arrivals late, and only between other things.

Each trace has one plain put of as many bytes and then one served prompt, both after the same rest,
since a link that has rested takes a while to wake up.
"""

import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from experiments.kernel_profile import trace

GATHER = "jit_gather"
"""The program that reads pages, see `pdjax/device/kv/transfer_path.py`."""

REST = 0.1
"""Seconds."""


@dataclass(frozen=True)
class Traced:
    """Medians over traces; milliseconds, those of the sending device that took longest to copy.

    Attributes:
      put_ms: the copy of a plain put.
      copy_ms: all copies of the hand-off.
      gather_ms: kernels that read its pages.
      wait_ms: from the end of each gather to the begin of its copy.
      behind_ms: from the end of the last kernel before the last gather, which is the prefill's
        unless the gather came late, to the end of the last copy.
      nbytes: of the copies.
    """

    put_ms: float
    copy_ms: float
    gather_ms: float
    wait_ms: float
    behind_ms: float
    nbytes: float

    @property
    def of_put(self) -> float:
        """The copies' rate, as a share of the plain put's."""
        return self.put_ms / self.copy_ms

    @property
    def of_put_gathered(self) -> float:
        """The same, with the time that reading and waiting take."""
        return self.put_ms / (self.gather_ms + self.wait_ms + self.copy_ms)


class _Event(NamedTuple):
    """Something on a stream of a device, ns; `copied` bytes to another one."""

    begin: float
    end: float
    module: str
    copied: int


def traced(put: Callable[[], object], serve: Callable[[], object], rounds: int) -> Traced | None:
    """`rounds` traces of `put`, a plain put, and then of `serve`, which hands a prompt over; None
    where the profiler sees no copies between devices."""

    def both() -> None:
        for act in (put, serve):
            time.sleep(REST)
            act()

    found = [one for _ in range(rounds) if (one := read(trace(both))) is not None]
    if not found:
        return None
    each = [asdict(one) for one in found]
    return Traced(**{key: statistics.median(one[key] for one in each) for key in each[0]})


def read(planes: Iterable[Any]) -> Traced | None:
    """One trace; None if there are no copies between devices in it, or nothing gathered."""
    put, sent = 0.0, list[Traced]()
    for plane in planes:
        events = sorted(_events(plane)) if plane.name.startswith("/device:") else []
        gathers = [event for event in events if event.module == GATHER]
        copies = [event for event in events if event.copied]
        first = gathers[0].begin if gathers else float("inf")
        put += sum(copy.end - copy.begin for copy in copies if copy.begin < first)
        if copies := [copy for copy in copies if copy.begin >= first]:
            sent.append(_sent(events, gathers, copies))
    if not put or not sent:
        return None
    slowest = asdict(max(sent, key=lambda one: one.copy_ms))
    return Traced(**slowest | {"put_ms": put / 1e6})


def _sent(events: list[_Event], gathers: list[_Event], copies: list[_Event]) -> Traced:
    waited = [
        copy.begin - max(gather.end for gather in gathers if gather.begin < copy.begin)
        for copy in copies
    ]
    kernels = [event for event in events if event.module]
    runs = [list(run) for _, run in itertools.groupby(kernels, lambda e: e.module == GATHER)]
    last = max(i for i, run in enumerate(runs) if run[0].module == GATHER)
    before = runs[last - 1][-1].end if last else runs[last][0].begin
    return Traced(
        put_ms=0.0,
        copy_ms=sum(copy.end - copy.begin for copy in copies) / 1e6,
        gather_ms=sum(gather.end - gather.begin for gather in gathers) / 1e6,
        wait_ms=sum(max(0.0, each) for each in waited) / 1e6,
        behind_ms=(max(copy.end for copy in copies) - before) / 1e6,
        nbytes=sum(copy.copied for copy in copies),
    )


def _events(plane: Any) -> Iterator[_Event]:
    for line in plane.lines:
        if "Stream" not in line.name:
            continue
        for event in line.events:
            begin, end = event.start_ns, event.start_ns + event.duration_ns
            stats = dict(event.stats)
            copied = 0
            if event.name == "MemcpyP2P":
                [size] = re.findall(r"size:(\d+)", stats["memcpy_details"])
                copied = int(size)
            yield _Event(begin, end, stats.get("hlo_module", ""), copied)
