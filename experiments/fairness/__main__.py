"""Does fair sharing bound the difference in service between tenants of unequal load?

A heavy and a light tenant send requests to the disaggregated mode, under first come, first served
and under fair shares by virtual token counters (VTC, Sheng et al., OSDI 2024). Service is a token
of a prompt, counted at the first token of the answer, and twice a token of an answer. In `both`
each tenant asks for more than half of what the engines serve, in `light` one asks for far less.

While both have requests waiting, VTC bounds the difference of what they are served by 2 max(P, 2 R
A), with P tokens of the longest prompt, R rows and A tokens of the longest answer: the work that
fits into the engines at once.

Predicted before the first run, of two simulated H200: (1) in `both` the difference under fair
shares stays within the bound, and (2) under first come, first served it goes beyond, and grows as
long as both wait; (3) in `light` the light tenant's TTFT p90 is at most a fifth under fair shares;
(4) the output tokens a second differ by less than 5% between the policies.

  python -m experiments.fairness
  python -m experiments.fairness --backend=engine
  python -m experiments.fairness --url=http://127.0.0.1:8000 --vocab_size=128256 --label=fair
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from absl import flags

from experiments.common.study import Study
from experiments.common.study_charts import point_table
from experiments.common.study_files import Outcome, save_outcome
from experiments.common.study_flags import number_of, study_flags, study_of
from pdjax.bench.driver import Workload
from pdjax.flags import run
from pdjax.report.line_chart import Axis, LineChart, Series
from pdjax.workloads.arrival import Arrival
from pdjax.workloads.chances import lengths_of

LOADS = {
    "full": {"both": (32.0, 16.0), "light": (32.0, 3.0)},
    "small": {"both": (200.0, 100.0), "light": (200.0, 10.0)},
}
"""Requests a second of the heavy and the light tenant."""
SECONDS = {"full": 20.0, "small": 0.2}
POLICIES = ("fcfs", "fair")
ANSWER_WEIGHT = 2.0
"""Service of a token of an answer, where one of a prompt is 1; as `FairPrefill` has it."""

FLAGS = study_flags("fairness", ("disaggregated",))
FLAGS.set_default("seeds", 1)
flags.DEFINE_float("seconds", None, "of arrivals", flag_values=FLAGS)


def workload(study: Study, loads: tuple[float, float], seconds: float, seed: int) -> Workload:
    """Requests of both tenants, told apart by the label `user`, which servers take, too."""
    made = list[Arrival]()
    for number, (tenant, rate) in enumerate(zip(("heavy", "light"), loads, strict=True)):
        own = study.workload(rate, max(2, round(rate * seconds)), 2 * seed + number)
        made += [
            replace(each, id=f"{tenant}{i}", labels={"user": tenant})
            for i, each in enumerate(own.arrivals)
        ]
    return Workload(sorted(made, key=lambda each: each.moment), sum(loads), 1.0, None, seed)


def difference(records: list[dict[str, Any]], samples: int = 200) -> dict[str, Any]:
    """How far the service of the tenants goes apart while both have requests waiting for their
    first token: the longest such time, sampled.

    Returns:
      `moments`, seconds from its beginning, `apart`, tokens of service by which the heavy tenant is
      ahead since then, and `most`, the largest of them without its sign; None where they never both
      wait.
    """
    times = {tenant: _moments(records, tenant) for tenant in ("heavy", "light")}
    grid = np.linspace(0.0, max(line["due_s"] for line in records), samples)
    both = np.all([_waiting(of, grid) > 0 for of in times.values()], axis=0)
    begin, end = _longest(both)
    if end - begin < 2:
        return {"moments": [], "apart": [], "most": None}
    kept = grid[begin:end]
    ahead = _service(times["heavy"], kept) - _service(times["light"], kept)
    apart = ahead - ahead[0]
    return {
        "moments": (kept - kept[0]).tolist(),
        "apart": apart.tolist(),
        "most": float(np.abs(apart).max()),
    }


def _moments(records: list[dict[str, Any]], tenant: str) -> list[tuple[float, np.ndarray, int]]:
    """Of each request of a tenant: when it was due, the moments of its tokens, its prompt."""
    found = []
    for line in records:
        if line["id"].partition("#")[0].rstrip("0123456789").endswith(tenant):
            first = np.array([line["ttft_ms"] or np.inf])
            gaps = np.concatenate([first, np.array(line["itls_ms"], float)])
            moments = line["due_s"] + np.cumsum(gaps) / 1e3
            found.append((line["due_s"], moments, line["input_len"]))
    return found


def _waiting(requests: list[tuple[float, np.ndarray, int]], grid: np.ndarray) -> np.ndarray:
    """Requests at each moment that have no token yet."""
    return sum(
        ((grid >= due) & (grid < moments[0]) for due, moments, _ in requests),
        np.zeros(len(grid), int),
    )


def _service(requests: list[tuple[float, np.ndarray, int]], grid: np.ndarray) -> np.ndarray:
    """Tokens of service up to each moment."""
    served = np.zeros(len(grid))
    for _, moments, prompt in requests:
        tokens = np.searchsorted(moments, grid, side="right")
        served += prompt * (tokens > 0) + ANSWER_WEIGHT * tokens
    return served


def _longest(held: np.ndarray) -> tuple[int, int]:
    """The longest run of True: its first index, and the one behind its last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], held.astype(int), [0]])))
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    return max(runs, key=lambda each: each[1] - each[0], default=(0, 0))


def bound(study: Study) -> float:
    """Tokens of service within which VTC keeps tenants that both wait."""
    prompt, answer = (
        max(lengths_of(each).draw(np.random.default_rng(0), 1000).tolist())
        for each in (study.input_len, study.output_len)
    )
    rows = study.base.decode.engines * study.base.decode.rows
    return 2 * max(prompt, ANSWER_WEIGHT * rows * answer)


def measure(study: Study, seconds: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A point for each load and policy, of the first seed; records."""
    points, lines = list[dict[str, Any]](), list[dict[str, Any]]()
    policies: Mapping[str, Mapping[str, Any]] = {p: {"policies.prefill": p} for p in POLICIES}
    if study.server is not None:
        policies = {study.server.label: {}}
    for policy, overrides in policies.items():
        with study.serving(study.modes[0], overrides) as serving:
            for load, rates in LOADS[study.size].items():
                for seed in study.seeds:
                    made = workload(study, rates, seconds, seed)
                    point = serving.run(made, policy=policy, load=load)
                    records = serving.records
                    points.append(point | _of_tenants(records) | difference(records))
                    lines += [{"policy": policy, "load": load, **each} for each in records]
    return points, lines


def _of_tenants(records: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tenant in ("heavy", "light"):
        firsts = [
            1e3 * (moments[0] - due)
            for due, moments, _ in _moments(records, tenant)
            if np.isfinite(moments[0])
        ]
        p90 = float(np.percentile(firsts, 90)) if firsts else None
        found |= {f"{tenant}_requests": len(firsts), f"{tenant}_p90_ttft_ms": p90}
    return found


def predicted(points: list[dict[str, Any]], most: float) -> dict[str, bool | None]:
    """Whether each prediction came out, of the first seed; none of a server."""
    of: dict[tuple[str, str], dict[str, Any]] = {}
    for point in points:
        of.setdefault((point["policy"], point["load"]), point)
    if not all((policy, load) in of for policy in POLICIES for load in ("both", "light")):
        return {}
    fair, fcfs = of["fair", "both"], of["fcfs", "both"]
    grown: bool | None = None
    if fcfs["most"] is not None:
        grown = fcfs["most"] > most and abs(fcfs["apart"][-1]) > 0.9 * fcfs["most"]
    light = [of[policy, "light"]["light_p90_ttft_ms"] for policy in ("fair", "fcfs")]
    return {
        "under fair shares the difference stays within the bound": None
        if fair["most"] is None
        else fair["most"] <= most,
        "first come, first served goes beyond it, and grows": grown,
        "a light tenant's TTFT p90 is at most a fifth under fair shares": None
        if None in light
        else light[0] <= light[1] / 5,
        "output tokens a second differ by less than 5%": all(
            abs(of["fair", load]["output_throughput"] / of["fcfs", load]["output_throughput"] - 1)
            < 0.05
            for load in ("both", "light")
        ),
    }


def main() -> None:
    """Measure, print, save; see the module."""
    study = study_of(FLAGS)
    if len(study.modes) != 1:
        raise ValueError(f"modes={','.join(study.modes)}: must be one, of which policies differ")
    seconds = number_of(FLAGS, "seconds", SECONDS, study)
    points, lines = measure(study, seconds)
    most = bound(study)
    shown = [point for point in points if point["seed"] == study.seeds[0]]
    series = [
        Series(point["policy"], point["moments"], point["apart"])
        for point in shown
        if point["load"] == "both" and point["moments"]
    ]
    charts: dict[str, Any] = {}
    if series:
        charts["service"] = (
            LineChart(
                "How far the heavy tenant is ahead while both wait",
                Axis("seconds", least=0.0),
                Axis("tokens of service"),
                series,
                levels=[(most, "bound"), (-most, "bound")],
            ),
            "A token of a prompt is 1, one of an answer 2.",
        )
    columns = {"policy": "policy", "load": "load", "most apart, tokens": "most"}
    columns |= {"heavy: TTFT p90, ms": "heavy_p90_ttft_ms", "light: TTFT p90": "light_p90_ttft_ms"}
    columns |= {"output tokens/s": "output_throughput"}
    outcome = Outcome(
        title="The difference in service between tenants of unequal load",
        lead=[
            f"{p['policy']}, {p['load']}: the light tenant's TTFT p90 is "
            f"{p['light_p90_ttft_ms'] or float('nan'):,.0f} ms"
            + ("" if p["most"] is None else f"; at most {p['most']:,.0f} tokens apart")
            + "."
            for p in shown
        ]
        + [f"The bound while both wait is {most:,.0f} tokens of service."],
        whole={"seconds": seconds, "bound": most, "points": points},
        charts=charts,
        tables=[point_table("Each policy under each load", shown, columns)],
        predicted=predicted(points, most),
        records=lines,
    )
    save_outcome(study, outcome, FLAGS["out"].value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
