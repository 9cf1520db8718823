"""Tables of what `bench_scale` measures, and a comparison of two builds."""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np

from experiments.common.tables import number, table

Result = Mapping[str, Any]
"""The numbers of one run; see `this_build.drive`."""
Found = Mapping[int, Mapping[str, list[Any]]]
"""The runs by number of engines of each kind, then by build."""

WORDS = ("ttft", "tpot", "finish")


def coordinator_seconds(result: Result) -> float:
    """Return the processor time without the part that simulates engines and links."""
    return result["cpu_s"] * (1 - result["simulator_s"] / result["wall_s"])


def spread(values: list[float]) -> str:
    """Format the least and the greatest value, as shares of the median."""
    middle = median(values)
    return f"{min(values) / middle:.2f}-{max(values) / middle:.2f}"


def host_table(found: Found) -> str:
    """Make a table of the coordinator's processor time, a request, turn and event."""
    headers = ["engines", "build", "all, s", "coordinator, s", "spread", "ms/request"]
    headers += ["ms/simulated s", "turns", "us/turn", "events", "us/event"]
    rows = []
    for engines, builds in found.items():
        for build, runs in builds.items():
            seconds = [coordinator_seconds(each) for each in runs]
            middle, first = median(seconds), runs[0]
            events = first["events"]
            rows.append(
                [
                    f"{engines}+{engines}",
                    build,
                    number(median(each["cpu_s"] for each in runs), 2),
                    number(middle, 2),
                    spread(seconds),
                    number(middle / len(first["requests"]) * 1e3, 2),
                    number(middle / first["simulated_s"] * 1e3, 0),
                    number(first["turns"], 0),
                    number(middle / first["turns"] * 1e6, 0),
                    number(events, 0),
                    number(middle / events * 1e6 if events else None, 1),
                ]
            )
    return table(headers, rows)


def ratios(builds: Mapping[str, list[Any]], seconds: Callable[[Result], float]) -> list[float]:
    """Divide this build's time by the other's, for each pair of runs in turns."""
    pairs = zip(builds["new"], builds["base"], strict=True)
    return [seconds(new) / seconds(base) for new, base in pairs]


def ratio_table(found: Found) -> str:
    """Make a table of this build's processor time over the other's: the coordinator's, and all."""
    rows = []
    for engines, builds in found.items():
        if "base" not in builds:
            continue
        alone = ratios(builds, coordinator_seconds)
        whole = ratios(builds, lambda result: result["cpu_s"])
        cells = [
            cell
            for each in (alone, whole)
            for cell in (number(median(each), 3), f"{min(each):.3f}-{max(each):.3f}")
        ]
        rows.append([f"{engines}+{engines}", *cells])
    return table(["new / base", "coordinator", "range", "with simulator", "range"], rows)


def latencies(result: Result) -> dict[str, tuple[float, float | None, float]]:
    """Return (TTFT, TPOT, moment of the last token) of each request by its id, in seconds."""
    return {id: (ttft, tpot, finish) for id, ttft, tpot, finish in result["requests"]}


def latency_table(found: Found) -> str:
    """Make a table of latencies on the virtual clock, and a sentence for each comparison."""
    headers = ["engines", "build", "TTFT p50, ms", "p99", "TPOT p50, ms", "p99"]
    rows = []
    for engines, builds in found.items():
        for build, runs in builds.items():
            every = list(latencies(runs[0]).values())
            cells = []
            for of in (0, 1):
                sample = [value for each in every if (value := each[of]) is not None]
                cells += [number(float(p) * 1e3, 3) for p in np.percentile(sample, (50, 99))]
            rows.append([f"{engines}+{engines}", build, *cells])
    whole = table(headers, rows)
    for engines, builds in found.items():
        if "base" in builds:
            whole += f"\n\n{engines}+{engines}: {sentence(compared(builds))}"
    return whole


def compared(builds: Mapping[str, list[Any]]) -> dict[str, Any] | None:
    """Compare two builds; None where there is one.

    Returns:
      `steady`, whether all runs of a build are the same; `other_tokens`, the requests whose tokens
      differ; and for each of WORDS how many requests are `earlier` and `later` by more than a
      nanosecond, and the mean and the largest difference (new - base, seconds).
    """
    steady = all(
        (each["tokens"], each["requests"]) == (runs[0]["tokens"], runs[0]["requests"])
        for runs in builds.values()
        for each in runs
    )
    if "base" not in builds:
        return None
    new, base = builds["new"][0], builds["base"][0]
    tokens = new["tokens"].keys() | base["tokens"].keys()
    other = sorted(id for id in tokens if new["tokens"].get(id) != base["tokens"].get(id))
    result: dict[str, Any] = {
        "steady": steady,
        "requests": len(tokens),
        "other_tokens": other,
    }
    mine, theirs = latencies(new), latencies(base)
    for of, word in enumerate(WORDS):
        gaps = {
            id: float(mine[id][of] - theirs[id][of])  # type: ignore[operator]
            for id in mine.keys() & theirs.keys()
            if mine[id][of] is not None and theirs[id][of] is not None
        }
        apart = {id: gap for id, gap in gaps.items() if abs(gap) > 1e-9}
        result[word] = {
            "earlier": sum(gap < 0 for gap in apart.values()),
            "later": sum(gap > 0 for gap in apart.values()),
            "mean_s": float(np.mean(list(gaps.values()))) if gaps else None,
            "largest": max(apart.items(), key=lambda item: (abs(item[1]), item[0]), default=None),
        }
    return result


def sentence(outcome: Mapping[str, Any] | None) -> str:
    """Write a comparison as a sentence."""
    assert outcome is not None, "there are two builds"
    differ = len(outcome["other_tokens"])
    parts = [
        f"{outcome['requests'] - differ} of {outcome['requests']} requests have the same tokens",
        "runs repeat exactly" if outcome["steady"] else "RUNS OF ONE BUILD DIFFER",
    ]
    for word in WORDS:
        each = outcome[word]
        if each["largest"] is None:
            parts.append(f"{word} the same")
        else:
            id, gap = each["largest"]
            parts.append(
                f"{word} earlier for {each['earlier']}, later for {each['later']}, on average by "
                f"{each['mean_s'] * 1e6:+.1f} us, at most {gap * 1e6:+.1f} us ({id})"
            )
    return "; ".join(parts)
