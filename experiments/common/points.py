"""Points of a study: of several seeds together, shares of requests, capacity goodput."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.common.study import Serving, Study
from pdjax.core.slo import SLO
from pdjax.host.metrics.capacity import Point, find_capacity

_SUMMED = ("completed", "failed", "shed", "slo_good", "slo_total", "total_cached_tokens")


def pooled(points: Iterable[Mapping[str, Any]], *names: str) -> list[dict[str, Any]]:
    """One point for each combination of the values of `names`, in order of appearance.

    Requests of several seeds are counted together, so that `slo_attainment` is a share of all;
    latencies and rates are means over the seeds. What is no number is left out.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(tuple(point[name] for name in names), []).append(point)
    return [dict(zip(names, key, strict=True)) | _pooled(group) for key, group in groups.items()]


def _pooled(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"runs": len(group)}
    for key in group[0]:
        values = [point[key] for point in group]
        if key in _SUMMED:
            found[key] = None if None in values else sum(values)
        elif key != "seed" and all(type(value) in (int, float) for value in values):
            found[key] = statistics.fmean(values)
        elif all(value is None for value in values):
            found[key] = None
    total = found.get("slo_total")
    found["slo_attainment"] = found["slo_good"] / total if total else None
    return found


def met(records: Iterable[Mapping[str, Any]], slo: SLO) -> tuple[int, int]:
    """Requests that meet an SLO, and all of them, failed and shed ones included; of the lines of
    `record_json`. Those that were aborted are nobody's failure."""
    good = total = 0
    for line in records:
        if line["finish_reason"] == "abort":
            continue
        total += 1
        good += line["finish_reason"] in ("stop", "length") and _within(line, slo)
    return good, total


def _within(line: Mapping[str, Any], slo: SLO) -> bool:
    gaps = max(line["itls_ms"], default=0.0)
    held = (
        (line["ttft_ms"], slo.ttft),
        (line["tpot_ms"], slo.tpot),
        (gaps, slo.itl),
        (line["e2el_ms"], slo.e2el),
    )
    return all(most is None or (value or 0.0) <= 1e3 * most for value, most in held)


def capacity_of(
    study: Study,
    serving: Serving,
    requests: int,
    start: float,
    *,
    resolution: float = 0.05,
    share: float = 0.9,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Capacity goodput by bisection, the requests of all seeds pooled; the keys of
    `definitions.CAPACITY`."""

    def measure(rate: float) -> Point:
        good = total = 0
        for seed in study.seeds:
            found = serving.run(study.workload(rate, requests, seed))
            good, total = good + found["slo_good"], total + found["slo_total"]
        tell(f"{serving.mode}, {rate:.4g} requests/s: {good} of {total} good")
        return Point(rate, good, total)

    found = find_capacity(measure, start, share, resolution=resolution)
    return {"mode": serving.mode, **found.to_json(serving.chips)}


def told_rate(capacity: Mapping[str, Any]) -> str:
    """A capacity in words."""
    rate = capacity["rate"]
    return "none" if rate is None else f"{rate:.3g} requests/s"
