"""How much tighter may the SLO become before a mode falls below 90%?

The same requests come to each mode at one rate; both bounds are multiplied by each scale (after
DistServe, figure 8). One run a mode and seed is enough: its requests are held against each scale.

Predicted before the first run, of two simulated H200 at 14 requests a second: (1) attainment never
rises as the scale falls; (2) with the bound on TPOT alone, disaggregation holds 90% at a smaller
scale than either kind of replica; (3) with the bound on TTFT alone, replicas do.

  python -m experiments.slo_scale
  python -m experiments.slo_scale --rate=10 --scales=2,1,0.5 --backend=engine --seeds=1
  python -m experiments.slo_scale --url=http://127.0.0.1:8000 --vocab_size=128256
"""

from itertools import pairwise
from typing import Any

from absl import flags

from experiments.common.points import met
from experiments.common.study import Study
from experiments.common.study_charts import lines_over, point_table
from experiments.common.study_files import Outcome, save_outcome
from experiments.common.study_flags import number_of, numbers_of, requests_of, study_flags, study_of
from pdjax.core.slo import SLO
from pdjax.flags import run
from pdjax.report.line_chart import Axis

RATES = {"full": 14.0, "small": 20.0}
REQUESTS = {"full": 300, "small": 12}
SCALES = (2.0, 1.6, 1.4, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)

FLAGS = study_flags("slo_scale")
flags.DEFINE_float("rate", None, "requests a second", flag_values=FLAGS)
flags.DEFINE_list("scales", [], "multiply both bounds", flag_values=FLAGS)

BOUNDS = {"slo_attainment": ("ttft", "tpot"), "ttft_attainment": ("ttft",)} | {
    "tpot_attainment": ("tpot",)
}
"""Keys of shares, and the bounds that they are of."""


def measure(
    study: Study, rate: float, requests: int, scales: list[float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """A point for each mode and scale, the seeds pooled; the runs; records."""
    points, runs, lines = list[dict[str, Any]](), list[dict[str, Any]](), list[Any]()
    for mode in study.modes:
        records = list[dict[str, Any]]()
        with study.serving(mode) as serving:
            for seed in study.seeds:
                runs.append(serving.run(study.workload(rate, requests, seed)))
                records += serving.records
        lines += [{"mode": mode, "rate": rate, **each} for each in records]
        for scale in scales:
            point: dict[str, Any] = {"mode": mode, "rate": rate, "scale": scale}
            for key, names in BOUNDS.items():
                bounds = {name: scale * getattr(study.slo, name) for name in names}
                good, total = met(records, SLO(**bounds))
                point |= {key: good / total, key.replace("attainment", "good"): good}
            points.append(point | {"total": total})
    return points, runs, lines


def smallest(points: list[dict[str, Any]], mode: str, key: str) -> float | None:
    """The smallest scale down to which at least 90% hold; None where the largest has fewer."""
    found = None
    for point in sorted((p for p in points if p["mode"] == mode), key=lambda p: -p["scale"]):
        if point[key] < 0.9:
            break
        found = point["scale"]
    return found


def predicted(points: list[dict[str, Any]], modes: tuple[str, ...]) -> dict[str, bool | None]:
    """Whether each prediction came out; none of fewer modes."""
    if not set(modes) >= {"disaggregated", "colocated", "mixed"}:
        return {}

    def rank(mode: str, key: str) -> float:
        scale = smallest(points, mode, key)
        return float("inf") if scale is None else scale

    rivals = ("colocated", "mixed")
    falls = all(
        a[key] >= b[key]
        for mode in modes
        for a, b in pairwise(
            sorted((p for p in points if p["mode"] == mode), key=lambda p: -p["scale"])
        )
        for key in BOUNDS
    )
    tpot, ttft = "tpot_attainment", "ttft_attainment"
    return {
        "attainment never rises as the scale falls": falls,
        "by TPOT alone disaggregation holds 90% at the smallest scale": rank("disaggregated", tpot)
        < min(rank(rival, tpot) for rival in rivals),
        "by TTFT alone replicas hold 90% at a smaller scale": max(
            rank(rival, ttft) for rival in rivals
        )
        < rank("disaggregated", ttft),
    }


def main() -> None:
    """Measure, print, save; see the module."""
    study = study_of(FLAGS)
    rate = number_of(FLAGS, "rate", RATES, study)
    scales = numbers_of(FLAGS, "scales", dict.fromkeys(RATES, SCALES), study)
    requests = requests_of(FLAGS, REQUESTS, study)
    points, runs, lines = measure(study, rate, requests, scales)
    least = [
        {"mode": mode, **{key: smallest(points, mode, key) for key in BOUNDS}}
        for mode in study.modes
    ]
    axes = Axis("scale of both bounds"), Axis("share of all requests, %", least=0.0, most=100.0)
    charts = {}
    for key, names in BOUNDS.items():
        title = f"Requests that meet {' and '.join(names).upper()}, {rate:g} requests/s"
        drawn = lines_over(points, "scale", key, title, axes, scale=100, levels=[(90.0, "90%")])
        charts[key] = drawn, "At scale 1 the bounds are those of the SLO."
    told = {"mode": "mode", "scale": "scale", "both, %": "slo_attainment"}
    told |= {"TTFT, %": "ttft_attainment", "TPOT, %": "tpot_attainment"}
    outcome = Outcome(
        title="Attainment over the scale of the SLO",
        lead=[
            f"{each['mode']} holds 90% down to scale {each['slo_attainment'] or 'none'} "
            f"(TTFT alone {each['ttft_attainment'] or 'none'}, TPOT alone "
            f"{each['tpot_attainment'] or 'none'})."
            for each in least
        ],
        whole={"rate": rate, "requests": requests, "points": points, "runs": runs}
        | {"smallest": least},
        charts=charts,
        tables=[point_table("Each mode at each scale", points, told)],
        predicted=predicted(points, study.modes),
        records=lines,
    )
    save_outcome(study, outcome, FLAGS["out"].value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
