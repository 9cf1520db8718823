"""How does the token budget of prefill steps trade the first token against the others?

This is the experiment to copy: a question, a prediction, flags, a config, a seed, a table, JSON and
a figure. It takes seconds on a CPU, since the engines are simulated; the coordinator is the real
one. The same requests are served with each budget in two ways:

  colocated      one mesh prefills and decodes in turns
  disaggregated  a mesh for each, and a link between them

Predicted before the first run: with a larger budget (1) TTFT falls, because fewer steps pay their
fixed cost; (2) colocated TPOT and (3) colocated gaps grow, because a tick waits for a longer step;
(4) disaggregated gaps stay as they are. The end of the output says what came out.

  python -m experiments.template --out=results/template.json --plot=results/template.png
  python -m experiments.template --budgets=512 --budgets=2048 --config.decode.rows=16
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.common.figures import new_figure, save_figure
from experiments.common.origin import origin, save
from experiments.common.tables import number, table
from pdjax.config import Config
from pdjax.config.load import load_config
from pdjax.flags import config_of, new_flags, run
from pdjax.sim.cluster import Cluster
from pdjax.sim.costs import StepCosts
from pdjax.workloads.synthetic import poisson

WAYS = {"colocated": 1, "disaggregated": 0}
"""Each way, and how many engines of either kind share their mesh."""

COSTS = StepCosts(prefill_step=2e-3, prefill_token=1 / 44_000, tick=7e-3)
"""Seconds, about those of Llama-3-8B on one H100; see `experiments.bench_steps`."""

KEYS = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "gap_p50", "gap_p99")

FLAGS = new_flags(config="experiments/template/config.py")
_BUDGETS = flags.DEFINE_multi_integer(
    "budgets", [128, 256, 512, 1024, 2048, 4096], "tokens of a prefill step", flag_values=FLAGS
)
_RATE = flags.DEFINE_float("rate", 4.0, "requests a second", flag_values=FLAGS)
_REQUESTS = flags.DEFINE_integer("requests", 100, "requests of a run", flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "seed of arrivals and lengths", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "results/template.json", "file to write", flag_values=FLAGS)
_PLOT = flags.DEFINE_string("plot", None, "file of a figure; needs matplotlib", flag_values=FLAGS)


def measure(config: Config, way: str, rate: float, requests: int, seed: int) -> dict[str, float]:
    """Serve the requests; return the percentiles KEYS, in milliseconds."""
    cluster = Cluster(config, shared=WAYS[way], costs=COSTS)
    cluster.expect(poisson(rate, requests, prompt=(200, 3000), output=(20, 200), seed=seed))
    ended = cluster.run().requests
    samples = {
        "ttft": [each.ttft for each in ended],
        "tpot": [each.tpot for each in ended],
        "gap": [gap for each in ended for gap in each.itl],
    }
    found = {}
    for key in KEYS:
        name, _, share = key.partition("_p")
        found[key] = 1e3 * float(np.percentile(np.array(samples[name], float), int(share)))
    return found


def outcome(points: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each prediction holds between the smallest and the largest budget; a change of less
    than 5% counts as none."""
    ratio: dict[tuple[str, str], float] = {}
    for way in WAYS:
        of_way = [point for point in points if point["way"] == way]
        for key in KEYS:
            ratio[way, key] = of_way[-1][key] / of_way[0][key]
    return {
        "TTFT falls": all(ratio[way, "ttft_p50"] < 0.95 for way in WAYS),
        "colocated TPOT grows": ratio["colocated", "tpot_p99"] > 1.05,
        "colocated gaps grow": ratio["colocated", "gap_p99"] > 1.05,
        "disaggregated gaps stay": abs(ratio["disaggregated", "gap_p99"] - 1) <= 0.05,
    }


def show(points: list[dict[str, Any]]) -> str:
    """Make the table, a row for each way and budget."""
    heads = [f"{key.replace('_', ' ')}, ms" for key in KEYS]
    rows = [
        [f"{point['way']}, {point['budget']}", *(number(point[key]) for key in KEYS)]
        for point in points
    ]
    return table(["way, tokens of a step", *heads], rows)


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Draw TTFT and the longest gaps over the budget, a line for each way."""
    figure = new_figure(9, 4)
    for axes, key in zip(figure.subplots(1, 2), ("ttft_p50", "gap_p99"), strict=True):
        for way in WAYS:
            of_way = [point for point in points if point["way"] == way]
            axes.plot([p["budget"] for p in of_way], [p[key] for p in of_way], "o-", label=way)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of a prefill step, at most")
        axes.set_ylabel(f"{key.replace('_', ' ')}, ms")
        axes.legend()
    save_figure(figure, path)


def main() -> None:
    """Measure, print, save; see the module."""
    base, load = config_of(FLAGS), (_RATE.value or 0.0, _REQUESTS.value or 0, _SEED.value or 0)
    points: list[dict[str, Any]] = []
    for way in WAYS:
        for budget in sorted(_BUDGETS.value or ()):
            config = load_config(base, {"prefill.token_budget": budget})
            points.append({"way": way, "budget": budget} | measure(config, way, *load))
    held = outcome(points)
    print(show(points))
    print("\n".join(f"predicted: {what}: {'right' if held[what] else 'WRONG'}" for what in held))
    whole: dict[str, Any] = dict(zip(("rate", "requests", "seed"), load, strict=True))
    whole |= {"costs": asdict(COSTS), "config": asdict(base), "points": points, "predicted": held}
    save(origin() | whole, _OUT.value)
    if _PLOT.value:
        draw(points, Path(_PLOT.value))


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
