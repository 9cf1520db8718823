"""What does a request's time go on, from arrival to last token, in each mode?

The mean over completed requests of each part, which add up to the mean end-to-end latency (after
DistServe, figure 10): waiting in the queue; prefill, up to the first token; then, between the first
two tokens, waiting for a row of decode, for KV on its way (the part of the transfer that is
exposed) and for the tick; and decode, all the rest. With a slower link, and with KV that is sent
after its prefill instead of during it, the exposed part shows what overlap hides (Mooncake, figures
13 and 14). A server at a URL tells no parts but the first token and the rest.

Predicted before the first run, of two simulated H200 at 14 requests a second: (1) decode is most of
every mode's time; (2) disaggregation waits longer in the queue than replicas do, as one chip
prefills; (3) with layer-wise sending the exposed transfer is below 1 ms at the link's measured
rate, and (4) at a hundredth of it, it is the longest wait after the first token.

  python -m experiments.latency_breakdown
  python -m experiments.latency_breakdown --backend=engine --rates=10 --seeds=1
  python -m experiments.latency_breakdown --url=http://127.0.0.1:8000 --vocab_size=128256
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from absl import flags

from experiments.common.study import Study
from experiments.common.study_charts import point_table
from experiments.common.study_files import Outcome, save_outcome
from experiments.common.study_flags import numbers_of, requests_of, study_flags, study_of
from pdjax.flags import run
from pdjax.report.bar_chart import BarChart

RATES = {"full": (6.0, 14.0), "small": (20.0,)}
REQUESTS = {"full": 300, "small": 12}
SLOWER = (10.0, 100.0)
"""How many times slower the link is simulated, too."""

WAITS = {
    "queue": "queue_ms",
    "prefill": "prefill_ms",
    "wait for a row": "row_wait_ms",
    "transfer, exposed": "kv_wait_ms",
    "wait for a tick": "tick_wait_ms",
}
"""Parts of a request's time, but for decode, and their keys in its record."""

FLAGS = study_flags("latency_breakdown")
flags.DEFINE_list("rates", [], "requests a second", flag_values=FLAGS)
_LINKS = flags.DEFINE_bool(
    "links",
    True,
    "slower links, and KV sent in bulk, too, where links are simulated",
    flag_values=FLAGS,
)


def parts_of(records: list[dict[str, Any]]) -> dict[str, float]:
    """Mean milliseconds of each part over completed requests; they add up to the latency.

    Raises:
      ValueError: no request has completed.
    """
    done = [line for line in records if line["finish_reason"] in ("stop", "length")]
    if not done:
        raise ValueError(f"requests: none of {len(records)} has completed, to take times of")
    whole = float(np.mean([line["e2el_ms"] for line in done]))
    first = float(np.mean([line["ttft_ms"] for line in done]))
    if any(line["queue_ms"] is None for line in done):  # of a server
        return {"first token": first, "later tokens": whole - first}
    parts = {
        part: float(np.mean([line[key] or 0.0 for line in done])) for part, key in WAITS.items()
    }
    return {**parts, "decode": whole - sum(parts.values())}


def set_ups(study: Study) -> Iterator[tuple[str, str, Study, Mapping[str, Any]]]:
    """Name, mode, study and overrides of each that is measured."""
    for mode in study.modes:
        yield mode, mode, study, {}
    if "disaggregated" not in study.modes or not _LINKS.value or study.server is not None:
        return
    yield "KV in bulk", "disaggregated", study, {"handoff.streaming": False}
    known = study.calibration
    if known is not None and known.link is not None:
        for times in SLOWER:
            slow = known.with_link(replace(known.link, bandwidth=known.link.bandwidth / times))
            slower = replace(study, calibration=slow)
            yield f"link / {times:g}", "disaggregated", slower, {}
            bulk = {"handoff.streaming": False}
            yield f"link / {times:g}, in bulk", "disaggregated", slower, bulk


def measure(
    study: Study, rates: list[float], requests: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The parts of each set-up at each rate, the seeds pooled; records."""
    points, lines = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, mode, of, overrides in set_ups(study):
        with of.serving(mode, overrides) as serving:
            for rate in rates:
                records = list[dict[str, Any]]()
                for seed in of.seeds:
                    serving.run(of.workload(rate, requests, seed))
                    records += serving.records
                named = {"set_up": name, "mode": mode, "rate": rate}
                points.append({**named, "parts_ms": parts_of(records), "requests": len(records)})
                lines += [{**named, **each} for each in records]
    return points, lines


def predicted(points: list[dict[str, Any]]) -> dict[str, bool | None]:
    """Whether each prediction came out, at the highest rate; none of fewer modes."""
    top = max(point["rate"] for point in points)
    of = {point["set_up"]: point["parts_ms"] for point in points if point["rate"] == top}
    if not {"disaggregated", "colocated", "mixed"} <= set(of):
        return {}
    apart, slow = of["disaggregated"], of.get("link / 100")
    exposed = "transfer, exposed"
    waits = ("wait for a row", exposed, "wait for a tick")
    return {
        "decode is most of every mode's time": all(
            of[mode]["decode"] > sum(of[mode].values()) / 2
            for mode in ("disaggregated", "colocated", "mixed")
        ),
        "disaggregation waits longer in the queue": apart["queue"]
        > max(of["colocated"]["queue"], of["mixed"]["queue"]),
        "the exposed transfer is below 1 ms": apart[exposed] < 1.0,
        "at a hundredth of the link it is the longest wait after the first token": None
        if slow is None
        else slow[exposed] == max(slow[wait] for wait in waits),
    }


def main() -> None:
    """Measure, print, save; see the module."""
    study = study_of(FLAGS)
    rates, requests = numbers_of(FLAGS, "rates", RATES, study), requests_of(FLAGS, REQUESTS, study)
    points, lines = measure(study, rates, requests)
    charts, lead = {}, []
    for rate in rates:
        bars = [(p["set_up"], p["parts_ms"]) for p in points if p["rate"] == rate]
        drawn = BarChart(f"Mean time of a request, {rate:g} requests/s", "ms", bars)
        charts[f"parts_{rate:g}"] = drawn, "The parts add up to the mean end-to-end latency."
        waits = [(p["set_up"], p["parts_ms"]) for p in points if p["rate"] == rate]
        short = [(name, {k: v for k, v in ps.items() if k != "decode"}) for name, ps in waits]
        drawn = BarChart(f"The same without decode, {rate:g} requests/s", "ms", short)
        charts[f"waits_{rate:g}"] = drawn, "What comes before decode has begun."
        for name, parts in bars:
            most = max(parts, key=lambda part: parts[part])
            told = f"{sum(parts.values()):,.0f} ms, of which {most} {parts[most]:,.0f}"
            lead.append(f"{name} at {rate:g} requests/s: {told}.")
    names = list(points[0]["parts_ms"])
    flat = [{**point, **point["parts_ms"]} for point in points]
    columns = {"set-up": "set_up", "requests/s": "rate", **{f"{n}, ms": n for n in names}}
    outcome = Outcome(
        title="What a request's time goes on",
        lead=lead,
        whole={"requests": requests, "points": points},
        charts=charts,
        tables=[point_table("Mean milliseconds of each part", flat, columns)],
        predicted=predicted(points),
        records=lines,
    )
    save_outcome(study, outcome, FLAGS["out"].value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
