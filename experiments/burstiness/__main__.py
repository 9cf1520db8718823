"""What do bursts of arrivals cost each mode?

The same requests come at one rate by gamma processes of several coefficients of variation (CV; 1 is
Poisson). For equal prompts Kingman's formula says how long they wait for the one prefill engine of
the disaggregated mode: E[S] rho / (1 - rho) (CV^2 + 0) / 2, with E[S] the shortest time to a first
token that was seen, and rho the rate times it.

Predicted before the first run, of two simulated H200 at 12 requests a second: (1) TTFT p90 grows
with CV in every mode; (2) from CV 1 to CV 4 it grows more in the disaggregated mode than in
replicas; (3) the mean wait of the disaggregated mode is within 40% of Kingman's at CV 1 and above
it at CV 0.5, as the formula is exact in heavy traffic alone.

  python -m experiments.burstiness
  python -m experiments.burstiness --cvs=0.5,2 --rate=8 --backend=engine --seeds=1
  python -m experiments.burstiness --url=http://127.0.0.1:8000 --vocab_size=128256
"""

import math
from itertools import pairwise
from typing import Any

from absl import flags

from experiments.common.points import pooled
from experiments.common.study import Study
from experiments.common.study_charts import LATENCIES, lines_over, point_table
from experiments.common.study_files import Outcome, save_outcome
from experiments.common.study_flags import number_of, numbers_of, requests_of, study_flags, study_of
from pdjax.flags import run
from pdjax.report.line_chart import Axis, Series

CVS = {"full": (0.5, 1.0, 2.0, 4.0), "small": (0.5, 2.0)}
RATES = {"full": 12.0, "small": 20.0}
REQUESTS = {"full": 300, "small": 12}

FLAGS = study_flags("burstiness")
flags.DEFINE_list("cvs", [], "coefficients of variation of the gaps", flag_values=FLAGS)
flags.DEFINE_float("rate", None, "requests a second", flag_values=FLAGS)


def measure(
    study: Study, rate: float, cvs: list[float], requests: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A point for each mode, CV and seed; records."""
    points, lines = list[dict[str, Any]](), list[dict[str, Any]]()
    for mode in study.modes:
        with study.serving(mode) as serving:
            for cv in cvs:
                for seed in study.seeds:
                    made = study.workload(rate, requests, seed, burstiness=1 / cv**2)
                    point = serving.run(made, cv=cv)
                    seen = [each["ttft_ms"] for each in serving.records if each["ttft_ms"]]
                    points.append(point | {"min_ttft_ms": min(seen, default=None)})
                    lines += [{"mode": mode, "cv": cv, **each} for each in serving.records]
    return points, lines


def kingman(service_ms: float, rate: float, cv: float) -> float:
    """Mean milliseconds of waiting for a server of constant service time; infinite where it cannot
    keep up."""
    load = rate * service_ms / 1e3
    return math.inf if load >= 1 else service_ms * load / (1 - load) * cv**2 / 2


def with_waits(found: list[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
    """Points with the mean wait before a first token, and, of the disaggregated mode, Kingman's."""
    least: dict[str, float] = {}
    for each in found:
        if each["min_ttft_ms"] is not None:
            least[each["mode"]] = min(each["min_ttft_ms"], least.get(each["mode"], math.inf))
    told = []
    for each in found:
        service, mean = least.get(each["mode"]), each["mean_ttft_ms"]
        wait = None if service is None or mean is None else mean - service
        expected = None
        if each["mode"] == "disaggregated" and service is not None:
            expected = kingman(service, rate, each["cv"])
            expected = expected if math.isfinite(expected) else None
        told.append({**each, "wait_ms": wait, "kingman_ms": expected})
    return told


def predicted(found: list[dict[str, Any]]) -> dict[str, bool | None]:
    """Whether each prediction came out; None of CVs that were not measured, none of fewer modes."""
    of = {(each["mode"], each["cv"]): each for each in found}
    modes = {mode for mode, _ in of}
    if not modes >= {"disaggregated", "colocated", "mixed"}:
        return {}
    cvs = sorted({cv for _, cv in of})
    p90 = {key: each["p90_ttft_ms"] for key, each in of.items()}
    grows = all(p90[mode, a] < p90[mode, b] for mode in modes for a, b in pairwise(cvs))
    more: bool | None = None
    if {1.0, 4.0} <= set(cvs):
        by = {mode: p90[mode, 4.0] / p90[mode, 1.0] for mode in modes}
        more = by["disaggregated"] > max(by["colocated"], by["mixed"])
    waits: bool | None = None
    apart = {cv: of["disaggregated", cv] for cv in cvs}
    if {0.5, 1.0} <= set(cvs) and apart[1.0]["kingman_ms"]:
        near = abs(apart[1.0]["wait_ms"] / apart[1.0]["kingman_ms"] - 1) <= 0.4
        waits = near and apart[0.5]["wait_ms"] > apart[0.5]["kingman_ms"]
    return {
        "TTFT p90 grows with CV in every mode": grows,
        "from CV 1 to 4 it grows most in the disaggregated mode": more,
        "waits are as Kingman says at CV 1, and longer at 0.5": waits,
    }


def main() -> None:
    """Measure, print, save; see the module."""
    study = study_of(FLAGS)
    rate = number_of(FLAGS, "rate", RATES, study)
    cvs = numbers_of(FLAGS, "cvs", CVS, study)
    requests = requests_of(FLAGS, REQUESTS, study)
    points, lines = measure(study, rate, cvs, requests)
    found = with_waits(pooled(points, "mode", "cv"), rate)
    columns = {"mode": "mode", "CV": "cv", "good, %": "slo_attainment", **LATENCIES}
    columns |= {"wait, ms": "wait_ms", "Kingman, ms": "kingman_ms"}
    across = Axis("CV of the gaps between arrivals", log=True)
    known = [each for each in found if each["kingman_ms"] is not None]
    expected = []
    if known:
        name, xs = "Kingman, one prefill engine", [each["cv"] for each in known]
        expected = [Series(name, xs, [each["kingman_ms"] for each in known], dashed=True)]
    charts = {
        "ttft_p90": (
            lines_over(
                found,
                "cv",
                "p90_ttft_ms",
                f"Time to the first token, {rate:g} requests/s",
                (across, Axis("TTFT p90, ms", least=0.0)),
            ),
            "Nine of ten requests have their first token within it.",
        ),
        "wait": (
            lines_over(
                found,
                "cv",
                "wait_ms",
                "Mean wait before the first token",
                (across, Axis("mean TTFT - shortest TTFT, ms", least=0.0)),
                more=expected,
            ),
            "Beyond the shortest time to a first token that was seen.",
        ),
    }
    outcome = Outcome(
        title="What bursts of arrivals cost",
        lead=[
            f"{each['mode']}, CV {each['cv']:g}: TTFT p90 {each['p90_ttft_ms']:,.0f} ms, "
            f"{100 * each['slo_attainment']:.0f}% good."
            for each in found
            if each["p90_ttft_ms"] is not None
        ],
        whole={"rate": rate, "requests": requests, "points": points, "waits": found},
        charts=charts,
        tables=[point_table(f"Each CV at {rate:g} requests/s", found, columns)],
        predicted=predicted(found),
        records=lines,
    )
    save_outcome(study, outcome, FLAGS["out"].value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
