"""What experiments that play workloads to modes write: results, charts, and a report of both."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.common.origin import origin, write_json
from experiments.common.study import Study
from experiments.common.study_charts import printed
from pdjax.bench.modes import MODES
from pdjax.bench.steady_state import too_short
from pdjax.formats.strict_json import dumps
from pdjax.report.bar_chart import BarChart
from pdjax.report.blocks import Block, Figure, Table, Words
from pdjax.report.line_chart import LineChart
from pdjax.report.origin import Origin
from pdjax.report.report import Report, Section
from pdjax.report.standalone import standalone_svg


@dataclass(frozen=True)
class Outcome:
    """What an experiment has found.

    Attributes:
      title: of the report.
      lead: sentences with the outcome.
      whole: keys and values of the results, beside those that every study has.
      charts: file stem -> chart, and how to read it.
      tables: that are printed, and that the report shows.
      predicted: what was predicted, and whether it came out; None of what was not measured.
      records: lines, one a request, where they are kept.
    """

    title: str
    lead: Sequence[str]
    whole: Mapping[str, Any]
    charts: Mapping[str, tuple[LineChart | BarChart, str]]
    tables: Sequence[Table]
    predicted: Mapping[str, bool | None]
    records: Iterable[Mapping[str, Any]] = ()


_SAID = {True: "right", False: "WRONG", None: "not measured"}


def hardware_of(study: Study, found: Mapping[str, Any]) -> str:
    """What was measured, or what was simulated; `found`: by `origin`."""
    if study.calibration is not None:
        return f"simulated: {study.calibration.hardware}"
    if study.server is not None:
        return f"a server at {study.server.url}"
    return Origin.of(found, None).hardware


def warnings_of(outcome: Outcome) -> list[str]:
    """A sentence about the fastest rate of the points of which 90% are good, where its runs are too
    short for a steady state; none of outcomes without points at rates."""
    keys = {"rate", "slo_total", "slo_attainment", "median_e2el_ms"}
    points = [each for each in outcome.whole.get("points", ()) if keys <= set(each)]
    held = [each for each in points if each["median_e2el_ms"] and each["slo_attainment"] >= 0.9]
    if not held:
        return []
    at = max(held, key=lambda each: each["rate"])
    count, life = at["slo_total"] // at.get("runs", 1), at["median_e2el_ms"] / 1e3
    told = too_short(count, at["rate"], life, "requests")
    return [] if told is None else [f"At {at['rate']:g} requests a second: {told}"]


def save_outcome(study: Study, outcome: Outcome, folder: str | None) -> None:
    """Print the tables and the outcome; write results.json, a file for each chart, report.html, and
    records.jsonl where records are kept."""
    for each in outcome.tables:
        print(f"{each.caption}\n\n{printed(each)}\n")
    told = [f"predicted: {what}: {_SAID[held]}" for what, held in outcome.predicted.items()]
    warnings = warnings_of(outcome)
    outcome = replace(outcome, lead=[*outcome.lead, *warnings])
    print("\n".join([*outcome.lead, *told]))
    path, found = Path(folder or "."), origin()
    path.mkdir(parents=True, exist_ok=True)
    hardware = hardware_of(study, found)
    described = study.described() | {
        "hardware": hardware,
        "modes": list(study.modes),
        "seeds": list(study.seeds),
    }
    whole = {**found, **described, **outcome.whole, "predicted": outcome.predicted}
    whole["warnings"] = warnings
    write_json(whole, path / "results.json")
    for stem, (chart, _) in outcome.charts.items():
        titled = replace(chart, title=f"{chart.title} ({hardware})")
        (path / f"{stem}.svg").write_text(standalone_svg(titled), "utf-8")
    _report(study, outcome, found, hardware).save(path / "report.html")
    if study.keep:
        lines = "".join(f"{dumps(line)}\n" for line in outcome.records)
        (path / "records.jsonl").write_text(lines, "utf-8")
    print(
        f"saved {path}/: results.json, report.html" + "".join(f", {s}.svg" for s in outcome.charts)
    )


def _report(study: Study, outcome: Outcome, found: Mapping[str, Any], hardware: str) -> Report:
    shown: list[Block] = [Figure(chart, caption) for chart, caption in outcome.charts.values()]
    shown += outcome.tables
    if outcome.predicted:
        rows = [[what, _SAID[held]] for what, held in outcome.predicted.items()]
        shown.append(Table("Predicted before the first run", ["prediction", "came out"], rows))
    sections = [Section("Results", shown), Section("What ran", _what(study))]
    came = replace(Origin.of(found, study.seeds[0]), hardware=hardware)
    config = None if study.server else asdict(study.base)
    return Report(outcome.title, outcome.lead, sections, came, config)


def _what(study: Study) -> list[Block]:
    """What was compared, on what, with which requests."""
    ttft, tpot = (1e3 * (most or 0.0) for most in (study.slo.ttft, study.slo.tpot))
    seeds = f"seed {study.seeds[0]}"
    if len(study.seeds) > 1:
        seeds = (
            f"seeds {study.seeds[0]} to {study.seeds[-1]}, whose requests are counted together; "
            "latencies, their percentiles too, are means over the seeds"
        )
    told: list[Block] = [
        Words(
            f"Prompts of {study.input_len} tokens and answers of {study.output_len}; a request is "
            f"good with a TTFT within {ttft:g} ms and a TPOT within {tpot:g} ms. Arrivals are "
            f"open-loop; failed and shed requests count against a system; {seeds}."
        )
    ]
    if study.prefix_len:
        told.append(
            Words(
                f"Of the requests {study.prefix_share:.0%} begin with one of {study.prefix_groups} "
                f"prefixes of {study.prefix_len} tokens besides."
            )
        )
    if study.calibration is not None:
        told += [Words(sentence) for sentence in study.calibration.validity()]
        told.append(Words("The host's own time, HTTP and the network are not simulated."))
    if study.server is None:
        rows = [[name, MODES[name].says] for name in study.modes]
        told.append(Table("Modes, on the same chips", ["mode", "what it does"], rows))
    return told
