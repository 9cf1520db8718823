"""Which system serves most on two GPUs, and how does each stand beside vLLM's?

Poisson arrivals of 2,048 tokens in and 256 out come at each rate to each system: the modes of
pdjax, of which mixed steps with each budget, and other servers, by one client. A point is a system
at a rate. Each is kept as it is measured, so that a command which has come to its end of time goes
on where the one before it stopped: say the same command again. The time that each system took to
start is told, and every request has a line in records/.

Systems are named MODE or MODE@BUDGET; vllm is `vllm serve` with two data-parallel replicas of
random weights, where vLLM is installed; --rival=NAME=COMMAND is any other, with {port} in its
command. With --http pdjax is driven over HTTP, too, by the client that drives the others.

  python -m experiments.rivals --backend=engine --minutes=9
  python -m experiments.rivals --backend=engine --systems=mixed@512,vllm --http --minutes=9
  python -m experiments.rivals --requests=60 --rates=6,14
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags

from experiments.baselines import vllm, vllm_serve
from experiments.common.points import told_rate
from experiments.common.served import pdjax_over_http, program
from experiments.common.study import Serving, Study
from experiments.common.study_charts import LATENCIES, lines_over, point_table
from experiments.common.study_files import Outcome, save_outcome
from experiments.common.study_flags import numbers_of, study_flags, study_of
from experiments.rivals.kept import Kept
from pdjax.bench.modes import MODES
from pdjax.bench.system import System
from pdjax.flags import run
from pdjax.host.metrics.capacity import Point, capacity
from pdjax.report.line_chart import Axis, Series

RATES = {"full": (2.0, 6.0, 10.0, 14.0, 18.0, 22.0), "small": (10.0, 40.0)}
BUDGETS = {"full": (256.0, 512.0, 1024.0), "small": (8.0,)}
START_S = 130.0
"""Seconds that a start is expected to take, where it has not been seen."""

FLAGS = study_flags("rivals")
FLAGS.set_default("seeds", 1)
_OF: dict[str, Any] = {"flag_values": FLAGS}
flags.DEFINE_list("rates", [], "requests a second", **_OF)
flags.DEFINE_list("budgets", [], "of mixed steps, where --systems names none", **_OF)
_SYSTEMS = flags.DEFINE_list("systems", [], "MODE, MODE@BUDGET or vllm; all of them", **_OF)
_SECONDS = flags.DEFINE_float("seconds", 15.0, "of arrivals at each rate", **_OF)
_LEAST = flags.DEFINE_integer("least_requests", 40, "at a rate, however few a second", **_OF)
_MINUTES = flags.DEFINE_float("minutes", 9.0, "after which no other point is begun", **_OF)
_HTTP = flags.DEFINE_bool("http", False, "drive pdjax over HTTP, as other servers are", **_OF)
_FRONTS = flags.DEFINE_integer("fronts", 2, "processes of HTTP, with --http", **_OF)
_RIVALS = flags.DEFINE_multi_string("rival", [], "NAME=COMMAND of another server", **_OF)


def systems_of(study: Study, rivals: dict[str, str]) -> list[str]:
    """The names of what is measured.

    Raises:
      ValueError: no such system.
    """
    if study.server is not None:
        return [study.server.label]
    if not _SYSTEMS.value:
        budgets = numbers_of(FLAGS, "budgets", BUDGETS, study)
        named = [mode for mode in study.modes if mode != "mixed"]
        if "mixed" in study.modes:
            named += [f"mixed@{budget:.0f}" for budget in budgets]
        if study.backend == "engine" and vllm_serve.installed():
            named.append("vllm")
        return [*named, *rivals]
    for name in _SYSTEMS.value:
        mode, at, budget = name.partition("@")
        if name not in ("vllm", *rivals) and (
            mode not in MODES or (at and not (budget.isdecimal() and int(budget) > 0))
        ):
            allowed = ", ".join([*MODES, "MODE@BUDGET", "vllm", *rivals])
            raise ValueError(f"systems={name}: allowed are {allowed}")
    return list(_SYSTEMS.value)


def rivals_of() -> dict[str, str]:
    """The commands of other servers, by their names.

    Raises:
      ValueError: one without a name, or named as a mode is.
    """
    found = dict[str, str]()
    for each in _RIVALS.value or ():
        name, equals, command = each.partition("=")
        if not name or not equals or not command or name in (*MODES, "vllm"):
            raise ValueError(f"rival={each!r}: must be NAME=COMMAND, with a name of its own")
        found[name] = command
    return found


@contextmanager
def started(study: Study, name: str, rivals: dict[str, str]) -> Iterator[Serving]:
    """Start a system, until the context ends."""
    mode, _, budget = name.partition("@")
    began = time.perf_counter()

    def ready(system: System) -> Serving:
        return Serving(study, name, system, time.perf_counter() - began)

    chips = study.base.devices
    if name in rivals:
        with program(rivals[name], vocab_size=FLAGS["vocab_size"].value or 0, chips=chips) as made:
            yield ready(made)
    elif name == "vllm":
        spec, longest = study.base.model.spec, study.base.model.max_model_len
        if spec is None or longest is None:
            raise ValueError("systems=vllm: needs a config with a model.spec and a max_model_len")
        with (
            vllm_serve.serve_command(spec, longest, chips) as command,
            program(command, vocab_size=spec.vocab_size, chips=chips) as made,
        ):
            yield ready(made)
    else:
        own = {"prefill.mixed_budget": int(budget)} if budget else {}
        if _HTTP.value and study.backend == "engine":
            with pdjax_over_http(study.config(mode, own), _FRONTS.value or 0) as made:
                yield ready(made)
        else:
            with study.serving(mode, own) as serving:
                serving.mode = name
                yield serving


def measure(
    study: Study, kept: Kept, rates: list[float], rivals: dict[str, str], now: Callable[[], float]
) -> list[str]:
    """Measure what is not kept yet, while there is time; what is left, by system and rate."""
    began, end = now(), now() + 60 * (_MINUTES.value or 0.0)
    left, seconds = list[str](), _SECONDS.value or 0.0
    for name in systems_of(study, rivals):
        missing = [
            (rate, seed) for rate in rates for seed in study.seeds if not kept.has(name, rate, seed)
        ]
        start = kept.start_s(name, START_S if study.backend == "engine" else 0.0)
        if missing and now() > began and now() + start + 2 * seconds > end:
            left += [f"{name} at {rate:g}/s" for rate, _ in missing]
            continue
        if not missing:
            continue
        with started(study, name, rivals) as serving:
            print(f"{name}: started in {serving.start_s:.1f} s", flush=True)
            for rate, seed in missing:
                if now() + 2 * seconds > end:
                    left.append(f"{name} at {rate:g}/s")
                    continue
                count = FLAGS["requests"].value or max(_LEAST.value or 1, round(rate * seconds))
                point = serving.run(study.workload(rate, count, seed), system=name)
                kept.add(point | {"start_s": serving.start_s}, serving.records)
                good, total = point["slo_good"], point["slo_total"]
                print(f"{name} at {rate:g}/s: {good} of {total} good", flush=True)
    return left


def capacities(study: Study, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The highest measured rate of each system up to which 90% of the requests are good."""
    found = []
    for name in dict.fromkeys(point["system"] for point in points):
        of = [point for point in points if point["system"] == name]
        said = capacity([Point(p["rate"], p["slo_good"], p["slo_total"]) for p in of])
        told = said.to_json(of[0]["num_gpu"])
        found.append({"system": name, "start_s": of[-1]["start_s"], **told})
    return found


def _vllms(study: Study, key: str) -> list[Series]:
    """vLLM's numbers of another day, where the requests are those and the system has two GPUs."""
    same = (study.input_len, study.output_len) == ("2048", "256") and study.base.devices == 2
    column = {"p90_ttft_ms": "ttft_p90", "median_tpot_ms": "tpot_p50", "p99_itl_ms": "itl_p99"}
    if not same:
        return []
    return [
        Series(
            f"{name} (measured before)",
            list(rates),
            [of[column[key]] for of in rates.values()],
            dashed=True,
        )
        for name, rates in vllm.POISSON.items()
    ]


def main() -> None:
    """Measure, print, save; see the module."""
    study, rivals, out = study_of(FLAGS), rivals_of(), FLAGS["out"].value or "."
    rates = numbers_of(FLAGS, "rates", RATES, study)
    kept = Kept(Path(out), study.described())
    left = measure(study, kept, rates, rivals, time.monotonic)
    points = kept.points()
    if not points:
        raise ValueError(f"minutes={_MINUTES.value}: too few for a single point")
    found = capacities(study, points)
    across = Axis("requests a second", least=0.0)
    charts: dict[str, Any] = {
        "attainment": (
            lines_over(
                points,
                "rate",
                "slo_attainment",
                "Requests that are good",
                (across, Axis("share of all, %", least=0.0, most=100.0)),
                by="system",
                scale=100,
                levels=[(90.0, "90%")],
            ),
            "Failed and shed requests count against a system.",
        )
    }
    for key, title in {
        "p90_ttft_ms": "TTFT p90",
        "median_tpot_ms": "TPOT p50",
        "p99_itl_ms": "ITL p99",
    }.items():
        axes = across, Axis(f"{title}, ms", least=0.0)
        drawn = lines_over(points, "rate", key, title, axes, by="system", more=_vllms(study, key))
        charts[key] = drawn, "Dashed: vLLM 0.26.0 on another day, on two H200 over HTTP."
    columns = {"system": "system", "requests/s": "rate", "good, %": "slo_attainment", **LATENCIES}
    names = {"system": "system", "start, s": "start_s", "requests/s": "rate", "a chip": "per_gpu"}
    names |= {"good": "good", "of": "total", "interpolated": "interpolated"}
    outcome = Outcome(
        title="Systems on two GPUs",
        lead=[f"{each['system']}: {told_rate(each)} with 90% good." for each in found]
        + ([f"Not measured yet: {', '.join(left)}."] if left else []),
        whole={"points": points, "capacities": found, "left": left, "vllm_before": vllm.POISSON},
        charts=charts,
        tables=[
            point_table("Each system at each rate", points, columns),
            point_table("The highest of these rates with 90% good, and the start", found, names),
        ],
        predicted={},
    )
    save_outcome(study, outcome, out)
    if left:
        print("the same command goes on with them")


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
