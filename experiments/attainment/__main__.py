"""Which mode serves the most requests within their SLO on the same chips, and at which rate?

The same requests come at each rate to each mode. Attainment is the share of all requests with both
TTFT and TPOT within their bounds (after DistServe, figures 8 and 9), also of each bound alone;
capacity goodput is the highest rate at which 90% are good, found by bisection.

Predicted before the first run, of two simulated H200: (1) replicas with mixed steps hold the
highest rate, since every chip may do what is needed; (2) disaggregated gaps between tokens (ITL
p99) are the shortest at every rate; (3) below 10 requests a second every mode has 90%.

  python -m experiments.attainment
  python -m experiments.attainment --backend=engine --rates=2,6,10 --requests=100 --seeds=1
  python -m experiments.attainment --url=http://127.0.0.1:8000 --vocab_size=128256 --num_gpu=2
"""

from typing import Any

from absl import flags

from experiments.common.points import capacity_of, met, pooled, told_rate
from experiments.common.study import Study
from experiments.common.study_charts import LATENCIES, lines_over, point_table
from experiments.common.study_files import Outcome, save_outcome
from experiments.common.study_flags import numbers_of, requests_of, study_flags, study_of
from pdjax.core.slo import SLO
from pdjax.flags import run
from pdjax.report.line_chart import Axis, LineChart

RATES = {"full": (2.0, 6.0, 10.0, 14.0, 18.0, 22.0), "small": (10.0, 40.0)}
REQUESTS = {"full": 300, "small": 12}

FLAGS = study_flags("attainment")
flags.DEFINE_list("rates", [], "requests a second", flag_values=FLAGS)
_CAPACITY = flags.DEFINE_bool("capacity", True, "search capacity goodput, too", flag_values=FLAGS)
_RESOLUTION = flags.DEFINE_float(
    "resolution", 0.05, "how near the search comes, relative", flag_values=FLAGS
)

SHARES = {"slo_attainment": "both", "ttft_attainment": "TTFT", "tpot_attainment": "TPOT"}
"""Keys of shares, and the bounds that they are of."""


def measure(
    study: Study, rates: list[float], requests: int, search: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """A point for each mode, rate and seed; capacities; records."""
    points, capacities, lines = list[dict[str, Any]](), list[dict[str, Any]](), list[Any]()
    for mode in study.modes:
        with study.serving(mode) as serving:
            for rate in rates:
                for seed in study.seeds:
                    point = serving.run(study.workload(rate, requests, seed))
                    points.append(point | _alone(study.slo, serving.records))
                    lines += [{"mode": mode, "rate": rate, **each} for each in serving.records]
            if search:
                middle = rates[len(rates) // 2]
                near = _RESOLUTION.value or 0.05
                capacities.append(capacity_of(study, serving, requests, middle, resolution=near))
    return points, capacities, lines


def _alone(slo: SLO, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Requests that meet each bound alone."""
    return {
        "ttft_good": met(records, SLO(ttft=slo.ttft))[0],
        "tpot_good": met(records, SLO(tpot=slo.tpot))[0],
    }


def shares(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The seeds pooled, with the share of each bound alone."""
    found = pooled(points, "mode", "rate")
    for each in found:
        for name in ("ttft", "tpot"):
            # A mean over the runs, of which each had as many requests.
            each[f"{name}_attainment"] = each[f"{name}_good"] * each["runs"] / each["slo_total"]
    return found


def predicted(
    found: list[dict[str, Any]], capacities: list[dict[str, Any]]
) -> dict[str, bool | None]:
    """Whether each prediction holds; None of what was not measured."""
    modes = {each["mode"] for each in found}
    if not modes >= {"disaggregated", "colocated", "mixed"}:
        return {}
    rate = {each["mode"]: each["rate"] or 0.0 for each in capacities}
    gaps = {(each["mode"], each["rate"]): each["p99_itl_ms"] for each in found}
    rates = {each["rate"] for each in found}
    return {
        "mixed replicas hold the highest rate": rate["mixed"]
        > max(rate[rival] for rival in ("disaggregated", "colocated"))
        if rate
        else None,
        "disaggregated gaps are the shortest at every rate": all(
            gaps["disaggregated", r] < min(gaps[rival, r] for rival in ("colocated", "mixed"))
            for r in rates
        ),
        "below 10 requests a second every mode has 90%": all(
            each["slo_attainment"] >= 0.9 for each in found if each["rate"] < 10
        ),
    }


def charts(found: list[dict[str, Any]]) -> dict[str, tuple[LineChart, str]]:
    """Attainment of both bounds and of each alone, a line for each mode."""
    axes = Axis("requests a second", least=0.0), Axis("share of all, %", least=0.0, most=100.0)
    made = {}
    for key, name in SHARES.items():
        title = f"Requests that meet their bound on {name}"
        drawn = lines_over(found, "rate", key, title, axes, scale=100, levels=[(90.0, "90%")])
        made[key] = drawn, "Failed and shed requests count against a mode."
    return made


def main() -> None:
    """Measure, print, save; see the module."""
    study = study_of(FLAGS)
    rates, requests = numbers_of(FLAGS, "rates", RATES, study), requests_of(FLAGS, REQUESTS, study)
    points, capacities, lines = measure(study, rates, requests, bool(_CAPACITY.value))
    found = shares(points)
    heads = {f"{name}, %": key for key, name in SHARES.items()}
    columns = {"mode": "mode", "requests/s": "rate", **heads, **LATENCIES}
    tables = [point_table("Each mode at each rate", found, columns)]
    if capacities:
        names = {"mode": "mode", "requests/s": "rate", "a chip": "per_gpu", "good": "good"}
        names |= {"of": "total", "interpolated": "interpolated"}
        tables.append(point_table("Capacity goodput, 90% good", capacities, names))
    outcome = Outcome(
        title="Attainment over the rate of requests",
        lead=[f"Capacity goodput of {c['mode']}: {told_rate(c)}." for c in capacities],
        whole={"requests": requests, "points": points, "capacities": capacities},
        charts=charts(found),
        tables=tables,
        predicted=predicted(found, capacities),
        records=lines,
    )
    save_outcome(study, outcome, FLAGS["out"].value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
