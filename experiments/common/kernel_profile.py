"""The kernels of a step and their times, from a trace of the profiler."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from experiments.common.tables import number, table

SHOWN = 16
"""Rows of a table on the terminal; one more row sums up the rest."""


@dataclass(frozen=True)
class KernelRow:
    """All launches of one kernel in one step."""

    name: str
    count: float
    total_us: float

    @property
    def each_us(self) -> float:
        return self.total_us / self.count


def profile(step: Callable[[], object], steps: int = 2) -> list[KernelRow]:
    """Profile a step that has run before; return the mean of `steps`, longest kernels first.

    The list is empty where the profiler sees no device. XLA splits its command buffers under the
    profiler, so gaps between kernels, and the step, are longer than otherwise; kernels are not.
    """

    def several() -> None:
        for _ in range(steps):
            step()

    return rows(trace(several), steps)


def trace(act: Callable[[], object]) -> list[Any]:
    """Trace `act`; return the profiler's planes of lines of events, devices included.

    Host events are off, since recording them slows the host and makes most of a trace; and so are
    the programs, all that the process has compiled.
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            act()
        [file] = Path(folder).rglob("*.xplane.pb")
        return list(ProfileData.from_file(str(file)).planes)


def rows(planes: Iterable[Any], steps: int) -> list[KernelRow]:
    """Sum up, by name, the kernels on streams of GPUs or the operations of TPUs."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for plane in planes:
        if not plane.name.startswith("/device:"):
            continue
        lines = list(plane.lines)
        streams = [line for line in lines if "Stream" in line.name]
        for line in streams or [line for line in lines if line.name == "XLA Ops"]:
            for event in line.events:
                found[event.name].append(event.duration_ns / 1e3)
    kernels = [KernelRow(name, len(us) / steps, sum(us) / steps) for name, us in found.items()]
    return sorted(kernels, key=lambda row: -row.total_us)


def show(kernels: list[KernelRow]) -> str:
    """Make a table of the longest kernels, and the sum of all."""
    if not kernels:
        return "the profiler saw no device"
    lines = [_line(row) for row in kernels[:SHOWN]]
    if rest := kernels[SHOWN:]:
        lines.append(_line(_sum(f"{len(rest)} others", rest)))
    lines.append(_line(_sum("all", kernels)))
    return table(["kernel", "count", "us each", "us a step"], lines)


def _sum(name: str, kernels: list[KernelRow]) -> KernelRow:
    return KernelRow(name, sum(r.count for r in kernels), sum(r.total_us for r in kernels))


def _line(row: KernelRow) -> list[str]:
    return [row.name[:60], number(row.count, 0), number(row.each_us, 1), number(row.total_us, 0)]
