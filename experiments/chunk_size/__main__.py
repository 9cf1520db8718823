"""How many prompt tokens may a step of the colocated rival hold, and what is it worth at its best?

The same requests come to replicas with each budget: in mixed steps (Sarathi-Serve: chunks beside
decode rows), and in steps of prompts alone, which decode waits for. Some of them share a prefix,
and both sides reuse it. The disaggregated mode stands beside as it is. The budget with the highest
capacity goodput is that of the rival tuned honestly: other experiments take it by
--config.prefill.mixed_budget.

Predicted before the first run, of two simulated H200: (1) with a larger budget the longest gaps of
replicas (ITL p99) grow, and (2) their TTFT falls; (3) disaggregated gaps are shorter than those of
mixed steps of 256 tokens; (4) every mode finds as many tokens in its prefix caches, within 10%.

  python -m experiments.chunk_size
  python -m experiments.chunk_size --budgets=256,512 --backend=engine --seeds=1
"""

from typing import Any

from absl import flags

from experiments.common.points import capacity_of, pooled, told_rate
from experiments.common.study import Study
from experiments.common.study_charts import LATENCIES, point_table
from experiments.common.study_files import Outcome, save_outcome
from experiments.common.study_flags import number_of, numbers_of, requests_of, study_flags, study_of
from pdjax.flags import run
from pdjax.report.line_chart import Axis, LineChart, Series

BUDGETS = {"full": (256, 512, 1024, 2048, 4096), "small": (8, 32)}
RATES = {"full": 14.0, "small": 20.0}
REQUESTS = {"full": 200, "small": 12}
PREFIX = {"full": "1024", "small": "8"}

FLAGS = study_flags("chunk_size")
FLAGS.set_default("prefix_share", 0.5)
flags.DEFINE_list("budgets", [], "most tokens of prompts in a step", flag_values=FLAGS)
flags.DEFINE_float("rate", None, "requests a second", flag_values=FLAGS)
_CAPACITY = flags.DEFINE_bool("capacity", True, "search capacity goodput, too", flag_values=FLAGS)

FIELDS = {
    "mixed": lambda budget: {"prefill.mixed_budget": budget, "prefill.token_budget": budget},
    "colocated": lambda budget: {"prefill.token_budget": budget},
}
"""What a budget changes of the base, for each mode that has one."""


def measure(
    study: Study, rate: float, requests: int, budgets: list[int], search: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """A point for each mode, budget and seed; capacities; records."""
    points, capacities, lines = list[dict[str, Any]](), list[dict[str, Any]](), list[Any]()
    for mode in study.modes:
        for budget in budgets if mode in FIELDS else [study.base.prefill.token_budget]:
            overrides = FIELDS[mode](budget) if mode in FIELDS else {}
            with study.serving(mode, overrides) as serving:
                for seed in study.seeds:
                    made = study.workload(rate, requests, seed)
                    points.append(serving.run(made, budget=budget))
                    named = {"mode": mode, "budget": budget, "rate": rate}
                    lines += [{**named, **each} for each in serving.records]
                if search:
                    found = capacity_of(study, serving, requests, rate, resolution=0.1)
                    capacities.append({"budget": budget, **found})
    return points, capacities, lines


def predicted(found: list[dict[str, Any]]) -> dict[str, bool | None]:
    """Whether each prediction came out; none of fewer modes."""
    of = {(each["mode"], each["budget"]): each for each in found}
    if not {mode for mode, _ in of} >= {"disaggregated", "colocated", "mixed"}:
        return {}
    budgets = sorted(budget for mode, budget in of if mode == "mixed")
    ends = [(of[mode, budgets[0]], of[mode, budgets[-1]]) for mode in FIELDS]
    [apart] = [each for (mode, _), each in of.items() if mode == "disaggregated"]
    cached = [each["total_cached_tokens"] for each in found]
    return {
        "gaps of replicas grow with the budget": all(
            b["p99_itl_ms"] > 1.05 * a["p99_itl_ms"] for a, b in ends
        ),
        "TTFT of replicas falls with the budget": all(
            b["median_ttft_ms"] < 0.95 * a["median_ttft_ms"] for a, b in ends
        ),
        "disaggregated gaps are shorter than those of the smallest mixed steps": apart["p99_itl_ms"]
        < of["mixed", budgets[0]]["p99_itl_ms"],
        "every mode reuses as many tokens, within 10%": None
        if None in cached
        else max(cached) <= 1.1 * min(cached),
    }


def chart(found: list[dict[str, Any]], key: str, title: str, name: str) -> LineChart:
    """A key over the budget; the disaggregated mode, which has one, is a level."""
    budgets = sorted({each["budget"] for each in found if each["mode"] in FIELDS})
    series = [
        Series(
            mode,
            budgets,
            [
                each[key]
                for budget in budgets
                for each in found
                if (each["mode"], each["budget"]) == (mode, budget)
            ],
        )
        for mode in FIELDS
        if any(each["mode"] == mode for each in found)
    ]
    levels = [(each[key], each["mode"]) for each in found if each["mode"] not in FIELDS]
    axes = Axis("most tokens of prompts in a step", log=True), Axis(name, least=0.0)
    return LineChart(title, *axes, series, levels)


def tuned(capacities: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The best budget of each mode: that of the highest capacity, of equals the smallest."""
    best: dict[str, dict[str, Any]] = {}
    for each in capacities:
        rate = each["rate"] or 0.0
        if each["mode"] not in best or rate > (best[each["mode"]]["rate"] or 0.0):
            best[each["mode"]] = each
    return best


def main() -> None:
    """Measure, print, save; see the module."""
    study = study_of(FLAGS, PREFIX)
    if study.server is not None:
        raise ValueError(f"url={study.server.url}: its steps have a budget of their own")
    if not set(study.modes) & set(FIELDS):
        raise ValueError(f"modes={','.join(study.modes)}: one must be of {', '.join(FIELDS)}")
    rate = number_of(FLAGS, "rate", RATES, study)
    budgets = [int(each) for each in numbers_of(FLAGS, "budgets", BUDGETS, study)]
    requests = requests_of(FLAGS, REQUESTS, study)
    points, capacities, lines = measure(study, rate, requests, budgets, bool(_CAPACITY.value))
    found = pooled(points, "mode", "budget")
    columns = {"mode": "mode", "budget": "budget", "good, %": "slo_attainment", **LATENCIES}
    columns |= {"cached tokens": "total_cached_tokens"}
    tables = [point_table(f"Each budget at {rate:g} requests/s", found, columns)]
    best = tuned(capacities)
    if capacities:
        names = {"mode": "mode", "budget": "budget", "requests/s": "rate", "a chip": "per_gpu"}
        tables.append(point_table("Capacity goodput, 90% good", capacities, names))
    outcome = Outcome(
        title="What the size of a chunk trades",
        lead=[
            f"{mode} is at its best with {each['budget']} tokens: {told_rate(each)}."
            for mode, each in best.items()
        ],
        whole={"rate": rate, "requests": requests, "points": points, "capacities": capacities}
        | {"best": {mode: each["budget"] for mode, each in best.items()}},
        charts={
            "itl_p99": (
                chart(found, "p99_itl_ms", "The longest gaps between tokens", "ITL p99, ms"),
                "Of the gaps one in a hundred is longer.",
            ),
            "ttft_p50": (
                chart(found, "median_ttft_ms", "Time to the first token", "TTFT p50, ms"),
                "The median over the requests.",
            ),
        },
        tables=tables,
        predicted=predicted(found),
        records=lines,
    )
    save_outcome(study, outcome, FLAGS["out"].value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
