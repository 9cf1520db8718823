"""The results of a benchmark as a report."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from pdjax.host.metrics.bench_definitions import PERCENTILES
from pdjax.report.bar_chart import BarChart
from pdjax.report.blocks import Block, Facts, Figure, Points, Table
from pdjax.report.line_chart import Axis, LineChart, Series
from pdjax.report.origin import Origin
from pdjax.report.report import Report, Section

_METRICS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
_STATISTICS = ("mean", "median", *(f"p{n}" for n in PERCENTILES))
_COUNTS = (
    *("completed", "failed", "shed", "aborted", "duration", "request_throughput"),
    *("request_goodput", "output_throughput", "tput_per_gpu", "num_gpu", "mean_late_ms"),
)
_WAITS = ("queue_ms", "prefill_ms", "row_wait_ms", "kv_wait_ms", "tick_wait_ms")
_POINTS = 25
"""Points of a line of latencies."""


def report_of(whole: Mapping[str, Any], records: Seq[Mapping[str, Any]], origin: Origin) -> Report:
    """The report of a benchmark.

    Args:
      whole: its results, by the keys of `definitions.BENCH`.
      records: of its requests, by those of `definitions.RECORD`; warm-ups are left out. Of runs at
        several rates, those of all runs.
      origin: how it came about.
    """
    measured = [each for each in records if each["phase"] == "profiling"]
    runs = whole["runs"] or [whole]
    sections = [Section("Latencies", _latencies(whole, measured if len(runs) == 1 else []))]
    if len(runs) > 1:
        sections.append(Section("Rates compared", _rates(whole, runs)))
    work = _work(whole)
    if work:
        sections.append(Section("What engines and links did", work))
    if costs := whole["costs"]:
        sections.append(Section("What simulated steps cost", _costs(costs)))
    counts = {key: whole[key] for key in _COUNTS}
    sections.append(Section("Counts", [Facts("Of the run", counts), _played(whole)]))
    title = f"Benchmark of {whole['model_id']}"
    return Report(title, _lead(whole), sections, origin, whole["config"])


def _lead(whole: Mapping[str, Any]) -> list[str]:
    told = [
        f"{whole['completed']} of {whole['num_prompts']} requests completed, offered at "
        f"{_rate(whole)}; TTFT {_ms(whole, 'ttft')}, TPOT {_ms(whole, 'tpot')}, ITL "
        f"{_ms(whole, 'itl')} (median / p99)."
    ]
    if whole["slo_total"]:
        bounds = ", ".join(
            f"{_METRICS[name]} {most:g} ms" for name, most in (whole["slo"] or {}).items() if most
        )
        told.append(
            f"{whole['slo_good']} of {whole['slo_total']} were good"
            + (f": {bounds}." if bounds else ", by the SLOs that they asked for.")
        )
    if capacity := whole["capacity"]:
        rate = capacity["rate"]
        told.append(
            f"No rate that was measured has {capacity['share']:.0%} good."
            if rate is None
            else f"Capacity goodput: {rate:.4g} requests a second, {capacity['good']} of "
            f"{capacity['total']} good, at least {capacity['share']:.0%}."
        )
    return told


def _rate(whole: Mapping[str, Any]) -> str:
    rate, clients = whole["request_rate"], whole["max_concurrency"]
    if clients is not None:
        return f"once by each of {clients} clients"
    return "once" if rate == "inf" else f"{rate:.4g} a second"


def _ms(whole: Mapping[str, Any], name: str) -> str:
    values = whole[f"median_{name}_ms"], whole[f"p99_{name}_ms"]
    return " / ".join("-" if value is None else f"{value:.4g}" for value in values) + " ms"


def _latencies(whole: Mapping[str, Any], records: Seq[Mapping[str, Any]]) -> list[Block]:
    rows = [
        [title, *(whole[f"{statistic}_{name}_ms"] for statistic in _STATISTICS)]
        for name, title in _METRICS.items()
    ]
    blocks: list[Block] = [Table("Of completed requests, ms", ["", *_STATISTICS], rows)]
    lines = list(_lines(records))
    if lines:
        chart = LineChart(
            "How many requests are as fast",
            Axis("milliseconds", log=True),
            Axis("share of requests with at most so much", least=0.0, most=1.0),
            lines,
        )
        blocks.append(Figure(chart, "TPOT is of requests with two tokens at least."))
    parts = _parts(records)
    if parts:
        bars = [("before the second token", parts)]
        blocks.append(Figure(BarChart("What the time goes on", "ms a request, the mean", bars)))
    return blocks


def _lines(records: Seq[Mapping[str, Any]]) -> list[Series]:
    found = []
    for name in ("ttft", "tpot", "e2el"):
        known = [each[f"{name}_ms"] for each in records if each[f"{name}_ms"]]
        if len(known) > 1:
            shares = np.linspace(0, 1, min(_POINTS, len(known)))
            values = [float(value) for value in np.quantile(known, shares)]
            found.append(Series(_METRICS[name], values, [float(share) for share in shares]))
    return found


def _parts(records: Seq[Mapping[str, Any]]) -> dict[str, float]:
    """Mean waits before the second token; none of a server, which does not tell them."""
    found = {}
    for key in _WAITS:
        known = [each[key] for each in records if each[key] is not None]
        if known:
            found[key.removesuffix("_ms").replace("_", " ")] = float(np.mean(known))
    return found


def _rates(whole: Mapping[str, Any], runs: Seq[Mapping[str, Any]]) -> list[Block]:
    runs = sorted(runs, key=lambda run: float(run["request_rate"]))
    heads = ["requests a second", "good", "TTFT p90, ms", "TPOT p90, ms", "ITL p99, ms"]
    keys = ("p90_ttft_ms", "p90_tpot_ms", "p99_itl_ms")
    rows = [
        [
            f"{float(run['request_rate']):.4g}",
            f"{run['slo_good']} of {run['slo_total']}",
            *(run[key] for key in keys),
        ]
        for run in runs
    ]
    rates = [float(run["request_rate"]) for run in runs]
    share = whole["capacity"]["share"]
    chart = LineChart(
        "Good requests over rate",
        Axis("requests a second", least=0.0),
        Axis("share of requests within the SLO", least=0.0, most=1.0),
        [Series("attainment", rates, [run["slo_attainment"] for run in runs])],
        levels=[(share, f"{share:.0%}")],
    )
    return [Table("A run at each rate", heads, rows), Figure(chart)]


def _work(whole: Mapping[str, Any]) -> list[Block]:
    """Tables of engines and links; none of a server, which does not tell them."""
    blocks: list[Block] = []
    if engines := whole.get("engines"):
        rows = [
            [name, each["steps"], each["busy_seconds"], each["occupancy"], each["bubble_share"]]
            for name, each in engines.items()
        ]
        heads = ["engine", "steps", "busy, s", "rows active, of all", "idle stages, of all"]
        blocks.append(Table("Engines", heads, rows))
    if links := whole.get("links"):
        rows = [[name, each["bytes"], each["bytes_per_s"]] for name, each in links.items()]
        blocks.append(Table("Links", ["link", "bytes", "bytes a second on the wire"], rows))
    return blocks


def _costs(costs: Mapping[str, Any]) -> list[Block]:
    facts = {f"{name}, s": value for name, value in costs["coefficients"].items()}
    facts |= {f"source {n}": source for n, source in enumerate(costs["sources"], start=1)}
    return [Points(costs["sentences"]), Facts(f"Of {costs['hardware']}", facts)]


def _played(whole: Mapping[str, Any]) -> Facts:
    flags = {name: str(value) for name, value in whole["workload"].items()}
    return Facts("Flags of the workload", flags or {"workload": "the usual one"})
