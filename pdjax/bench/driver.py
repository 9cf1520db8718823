"""Runs of workloads on a system: warm-up, salts, records, and rates compared."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from pdjax.bench.record import Played, named, record_json
from pdjax.bench.results import details, point_of, run_results
from pdjax.bench.system import System
from pdjax.core.slo import SLO
from pdjax.host.metrics.capacity import Point, capacity, find_capacity
from pdjax.workloads.arrival import Arrival


@dataclass(frozen=True)
class Workload:
    """What is played.

    Attributes:
      arrivals: of it.
      rate: requests a second that are offered; math.inf where they come at once or as answers do.
      burstiness: of arrivals that were drawn; None of others.
      clients: of a closed loop; None of an open one.
      seed: of all chance.
    """

    arrivals: list[Arrival]
    rate: float
    burstiness: float | None
    clients: int | None
    seed: int


class Driver:
    """Plays workloads to a system, and keeps what became of them.

    Args:
      system: what is driven.
      slo: what makes a request good that has no bounds of its own.
      warmups: requests before those of the first run, one after the other; no number is about them.
      salt: prompts of another salt are other tokens, which a prefix cache of the system, as one
        that was played to before, has not.
      keep: whether records are kept.
      detailed: whether results have vLLM's arrays.

    Attributes:
      records: plain values, one a request of each run; see `record_json`.
    """

    def __init__(
        self,
        system: System,
        slo: SLO | None = None,
        *,
        warmups: int = 0,
        salt: str = "",
        keep: bool = True,
        detailed: bool = False,
    ) -> None:
        self._system, self._slo = system, slo
        self._warmups, self._salt = warmups, salt
        self._keep, self._detailed = keep, detailed
        self._runs = 0
        self.records: list[dict[str, Any]] = []

    def run(self, workload: Workload) -> dict[str, Any]:
        """Play a workload, after a warm-up if it is the first; its results, under the keys of
        `definitions.RUN` and `definitions.BENCH`."""
        warmups = 0 if self._runs else self._warm_up(workload.arrivals)
        # Another salt: no run finds the prompts of the one before in a prefix cache.
        tag = f"{self._runs}." if self._runs else ""
        self._runs += 1
        played = self._system.play(named(workload.arrivals, tag), f"{self._salt}run {tag} ")
        self._take(played, "profiling")
        if errors := [record.error for record in played.records if record.error]:
            print(f"{len(errors)} not served; the first: {errors[0]}", file=sys.stderr)
        found = run_results(played, self._slo, self._system.chips)
        return {
            **found,
            **(details(played) if self._detailed else {}),
            "num_warmups": warmups,
            "request_rate": "inf" if workload.rate == math.inf else workload.rate,
            "burstiness": workload.burstiness if workload.burstiness != math.inf else "inf",
            "max_concurrency": workload.clients,
        }

    def _warm_up(self, arrivals: list[Arrival]) -> int:
        """How many have been played, one after the other, before the clock of what is measured."""
        warm = [each for each in arrivals if not each.after][: self._warmups]
        chain = [
            replace(each, moment=0.0, id=f"w{i}", after=f"w{i - 1}" if i else "")
            for i, each in enumerate(warm)
        ]
        if chain:
            self._take(self._system.play(chain, f"{self._salt}warm-up "), "warmup")
        return len(chain)

    def _take(self, played: Played, phase: str) -> None:
        if self._keep:
            self.records += [
                record_json(record, played, phase, self._slo) for record in played.records
            ]


def compare_rates(
    run: Callable[[float], dict[str, Any]],
    rates: Iterable[float],
    *,
    start: float = 0.0,
    share: float = 0.9,
    resolution: float = 0.05,
    chips: int | None = None,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Runs at some rates, or a search for capacity goodput.

    Args:
      run: plays a workload at a rate, and returns its results.
      rates: to run at; none searches, and begins at `start`.
      share, resolution: of `find_capacity`.
      chips: of the system.
      tell: is given a line for each rate.

    Returns:
      the results of the run at the capacity, or else of the slowest, with `capacity` and `runs`.

    Raises:
      ValueError: a start, a share or a resolution out of range.
    """
    runs = dict[float, dict[str, Any]]()

    def measure(rate: float) -> Point:
        runs[rate] = found = run(rate)
        point = point_of(rate, found)
        tell(f"{rate:.4g} requests/s: {point.good} of {point.total} good")
        return point

    if asked := list(rates):
        compared = capacity([measure(rate) for rate in asked], share)
    else:
        if start == math.inf:
            raise ValueError("request_rate=inf: a search must begin at a finite rate")
        compared = find_capacity(measure, start, share, resolution=resolution)
    shown = compared.best or compared.points[0]
    kept = [runs[rate] for rate in sorted(runs)]
    return {**runs[shown.rate], "capacity": compared.to_json(chips), "runs": kept}
