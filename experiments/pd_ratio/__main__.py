"""How many of the chips should prefill, and does the rate-matching formula know it?

A fixed number of chips is split in every way between prefill and decode engines of one chip each;
of each split capacity goodput is searched, for requests of two kinds (after Mooncake, figure 15).
The formula matches rates: N_P / N_D = (input / S_P) / (output / S_D), with the prompt tokens a
second of a prefill engine, S_P, and the tokens a second of a decode engine within the bound on
TPOT, S_D, by the measured costs of steps that the simulation has.

Predicted before the first run, of six simulated H200: (1) the best split is the formula's, or next
to it; (2) longer answers to shorter prompts move it to decode; (3) the worst split holds less than
half of the best one's rate.

  python -m experiments.pd_ratio
  python -m experiments.pd_ratio --chips=3 --backend=engine --seeds=1
"""

from typing import Any

from absl import flags

from experiments.common.points import capacity_of, told_rate
from experiments.common.study import Study
from experiments.common.study_charts import lines_over, point_table
from experiments.common.study_files import Outcome, save_outcome
from experiments.common.study_flags import requests_of, study_flags, study_of
from pdjax.flags import run
from pdjax.report.line_chart import Axis
from pdjax.sim.step_cases import DecodeCase, PrefillCase

KINDS = {"full": ("2048/256", "512/512"), "small": ("24/8",)}
CHIPS = {"full": 6, "small": 3}
STARTS = {"full": 8.0, "small": 10.0}
REQUESTS = {"full": 300, "small": 8}

FLAGS = study_flags("pd_ratio", ("disaggregated",))
FLAGS.set_default("seeds", 1)
flags.DEFINE_list("kinds", [], "kinds of requests, each INPUT/OUTPUT", flag_values=FLAGS)
flags.DEFINE_integer("chips", None, "of both phases together", flag_values=FLAGS)
_RESOLUTION = flags.DEFINE_float(
    "resolution", 0.1, "how near the search comes, relative", flag_values=FLAGS
)


def kinds_of(study: Study) -> list[tuple[int, int]]:
    """Tokens of prompts and answers of each kind.

    Raises:
      ValueError: one that is no two lengths.
    """
    found = list[tuple[int, int]]()
    for kind in FLAGS["kinds"].value or KINDS[study.size]:
        lengths = kind.split("/")
        if len(lengths) != 2 or not all(each.isdecimal() and int(each) > 0 for each in lengths):
            raise ValueError(f"kinds={kind}: must be INPUT/OUTPUT, as 2048/256")
        found.append((int(lengths[0]), int(lengths[1])))
    return found


def matched(study: Study, prompt: int, output: int) -> float | None:
    """Prefill engines for each decode engine by the rate-matching formula; None where the costs of
    steps are not known."""
    if study.calibration is None:
        return None
    costs, most = study.calibration.costs, study.slo.tpot or 1e9
    fed = prompt / costs.of_prefill(PrefillCase(((prompt, 0),)))

    def tick(rows: int) -> float:
        return costs.of_decode(DecodeCase(rows, prompt + output // 2, rows))

    fitting = [rows for rows in range(1, study.base.decode.rows + 1) if tick(rows) <= most]
    rows = max(fitting, default=1)
    return (prompt / fed) / (output / (rows / tick(rows)))


def measure(study: Study, chips: int, requests: int) -> list[dict[str, Any]]:
    """The capacity of each split, for each kind of request."""
    found = list[dict[str, Any]]()
    for prompt, output in kinds_of(study):
        kind = study.of_lengths(str(prompt), str(output))
        start = STARTS[study.size]
        for prefill in range(1, chips):
            split = {"prefill.engines": prefill, "decode.engines": chips - prefill}
            named = {"kind": f"{prompt}/{output}", "prefill": prefill, "decode": chips - prefill}
            for mode in study.modes:
                with kind.serving(mode, split) as serving:
                    print(f"{named['kind']}, {prefill}P{chips - prefill}D")
                    near = _RESOLUTION.value or 0.1
                    each = capacity_of(kind, serving, requests, start, resolution=near)
                    found.append({**named, **each})
                    start = each["rate"] or start
    return found


def best_of(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The split of the highest rate."""
    return max((each for each in found if each["kind"] == kind), key=lambda p: p["rate"] or 0.0)


def predicted(
    found: list[dict[str, Any]], chips: int, ratios: dict[str, float | None]
) -> dict[str, bool | None]:
    """Whether each prediction came out."""
    kinds = list(dict.fromkeys(each["kind"] for each in found))
    near = [
        abs(best_of(found, kind)["prefill"] - chips * ratio / (1 + ratio)) <= 1
        for kind, ratio in ratios.items()
        if ratio is not None
    ]
    worst = [
        min(each["rate"] or 0.0 for each in found if each["kind"] == kind)
        < 0.5 * (best_of(found, kind)["rate"] or 0.0)
        for kind in kinds
    ]
    first, last = (best_of(found, kind)["prefill"] for kind in (kinds[0], kinds[-1]))
    return {
        "the best split is the formula's, or next to it": all(near) if near else None,
        "longer answers to shorter prompts move it to decode": last < first
        if kinds == list(KINDS["full"])
        else None,
        "the worst split holds less than half of the best one's rate": all(worst),
    }


def main() -> None:
    """Measure, print, save; see the module."""
    study = study_of(FLAGS)
    if study.server is not None or study.modes != ("disaggregated",):
        raise ValueError("modes: must be disaggregated, the only one that has two kinds of engines")
    chips = FLAGS["chips"].value
    chips = CHIPS[study.size] if chips is None else chips
    if chips < 2:
        raise ValueError(f"chips={chips}: must be at least 2, one for each phase")
    requests = requests_of(FLAGS, REQUESTS, study)
    found = measure(study, chips, requests)
    ratios = {f"{p}/{o}": matched(study, p, o) for p, o in kinds_of(study)}
    lead = []
    for kind, ratio in ratios.items():
        best = best_of(found, kind)
        formula = (
            ""
            if ratio is None
            else (f"; the formula says {chips * ratio / (1 + ratio):.1f} of {chips} for prefill")
        )
        split = f"{best['prefill']}P{best['decode']}D"
        lead.append(f"{kind}: best is {split}, with {told_rate(best)}{formula}.")
    columns = {"input/output": "kind", "prefill": "prefill", "decode": "decode"}
    columns |= {"requests/s": "rate", "a chip": "per_gpu", "good": "good", "of": "total"}
    drawn = lines_over(
        found,
        "prefill",
        "rate",
        f"Capacity goodput of {chips} chips, by input/output tokens",
        (Axis(f"prefill engines, of {chips} chips"), Axis("requests a second", least=0.0)),
        by="kind",
    )
    outcome = Outcome(
        title="How many of the chips should prefill",
        lead=lead,
        whole={"chips": chips, "requests": requests, "points": found, "matched": ratios},
        charts={"capacity": (drawn, "90% of the requests are good up to this rate.")},
        tables=[point_table("Capacity goodput of each split, 90% good", found, columns)],
        predicted=predicted(found, chips, ratios),
    )
    save_outcome(study, outcome, FLAGS["out"].value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
