"""A comparison as a report."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from pdjax.core.slo import SLO
from pdjax.explain.study import Standing, Study
from pdjax.explain.text import METRICS, PARTS, cell_text, reigns_of
from pdjax.explain.trial import SHOWN, Trial
from pdjax.explain.verdict import around, at_its_limit, verdict, warnings
from pdjax.host.metrics.request import PHASES
from pdjax.report.bar_chart import BarChart
from pdjax.report.blocks import Block, Facts, Figure, Points, Table, Words
from pdjax.report.line_chart import Axis, LineChart, Series
from pdjax.report.origin import Origin
from pdjax.report.report import Report, Section
from pdjax.sim.calibration import Calibration

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
_RATE = Axis("requests a second", least=0.0)


@dataclass(frozen=True)
class Asked:
    """What was asked for.

    Attributes:
      slo: what makes a request good.
      scales: of the grid of SLOs.
      rate: requests a second of the workload.
      resolution: to which capacities are known.
      chips: of all engines.
      calibration: of them.
      workload: the flags that it was made of.
    """

    slo: SLO
    scales: Seq[float]
    rate: float
    resolution: float
    chips: int
    calibration: Calibration
    workload: Mapping[str, Any]

    @property
    def slo_text(self) -> str:
        """The bounds in milliseconds, as "TTFT 300 ms, TPOT 10 ms"."""
        bounds = {name: getattr(self.slo, name) for name in _NAMES}
        return ", ".join(
            f"{_NAMES[name]} {most * 1e3:g} ms" for name, most in bounds.items() if most is not None
        )


def report_of(study: Study, asked: Asked, origin: Origin, config: Mapping[str, Any]) -> Report:
    """The report of a comparison."""
    standings = study.standings()
    cells = study.cells(asked.scales)
    chips = f"{asked.chips} simulated chips of {asked.calibration.hardware}"
    return Report(
        title=f"Disaggregate? {asked.calibration.model} on {asked.chips} chips",
        lead=[
            verdict(study, asked.resolution),
            f"SLO: {asked.slo_text}; a rate holds where {study.share:.0%} of all requests meet it, "
            "failed and shed ones counted against it.",
            around(cells),
            *warnings(study),
            f"The production coordinator and its policies served one workload on {chips}.",
        ],
        sections=[
            Section("How much each mode holds", _capacities(study, standings)),
            Section(f"At {asked.rate:.3g} requests a second", _at_rate(study, standings, asked)),
            Section("Where modes cross", _crossings(study, standings, asked)),
            Section("Under other SLOs", _grid(study, asked)),
            Section("What holds each mode back", _limits(study, standings)),
            Section("What a step costs, and how that is known", _costs(asked)),
        ],
        origin=origin,
        config=config,
    )


def _capacities(study: Study, standings: Seq[Standing]) -> list[Block]:
    rows = []
    for each in standings:
        best, worse = each.found.best, each.found.next
        rows.append(
            [
                each.mode.name,
                best.rate if best else None,
                f"{best.good} of {best.total}" if best else None,
                worse.rate if worse else None,
                f"{worse.good} of {worse.total}" if worse else None,
                each.found.interpolated,
                at_its_limit(study, each).name,
            ]
        )
    heads = [
        "mode",
        "capacity goodput, 1/s",
        "good there",
        "next rate, 1/s",
        "good there",
        "interpolated, 1/s",
        "held back by",
    ]
    return [
        Table("The highest rate that each mode holds", heads, rows, best=frozenset({(0, 1)})),
        Figure(
            LineChart(
                "Good requests over rate",
                _RATE,
                Axis("share of requests within the SLO", least=0.0, most=1.0),
                [Series(s.mode.name, *_line(study.trials(s.mode), _attainment)) for s in standings],
                levels=[(study.share, f"{study.share:.0%}")],
            ),
            "A mode's capacity goodput is where its line falls below the dashed one.",
        ),
    ]


def _line(trials: Seq[Trial], value: Any) -> tuple[list[float], list[float | None]]:
    return [trial.rate for trial in trials], [value(trial) for trial in trials]


def _attainment(trial: Trial) -> float:
    return trial.attainment


def _at_rate(study: Study, standings: Seq[Standing], asked: Asked) -> list[Block]:
    trials = [study.trial(each.mode, asked.rate) for each in standings]
    heads = [f"{metric} {part}" for metric in ("TTFT", "TPOT", "ITL") for part in PARTS]
    rows = []
    for trial in trials:
        _, good, total = trial.point()
        rows.append([trial.mode.name, f"{good} of {total}", *(trial.numbers[key] for key in SHOWN)])
    phases = [
        (trial.mode.name, {name: trial.load.phases[name] * 1e3 for name in PHASES})
        for trial in trials
    ]
    return [
        Table(
            "Latencies of completed requests, ms", ["mode", "good", *heads], rows, best=_best(rows)
        ),
        Figure(
            BarChart("What a request's time goes on", "ms a request, the mean", phases),
            "Queue: until its first chunk is dispatched; wait for row and transfer lie between its "
            "first two tokens.",
        ),
        Figure(
            BarChart("How busy chips are", "% of the run, the mean of a role", _busy(trials)),
            "A bar for each role of a mode's engines. Decode steps run while any row is active, so "
            "a busy decode chip may have room: see its rows below.",
        ),
    ]


def _best(rows: Seq[Seq[Any]]) -> frozenset[tuple[int, int]]:
    """The lowest value of each column of latencies."""
    best = set()
    for column in range(2, 2 + len(SHOWN)):
        known = [(row[column], n) for n, row in enumerate(rows) if row[column] is not None]
        if known:
            best.add((min(known)[1], column))
    return frozenset(best)


def _busy(trials: Seq[Trial]) -> list[tuple[str, dict[str, float]]]:
    return [
        (f"{trial.mode.name}, {role.name}", {"busy": role.utilisation * 100})
        for trial in trials
        for role in trial.load.roles
    ]


def _crossings(study: Study, standings: Seq[Standing], asked: Asked) -> list[Block]:
    rows = [[METRICS[metric], reigns_of(study.reigns(metric)) or None] for metric in METRICS]
    names = {"p90_ttft_ms": "ttft", "p90_tpot_ms": "tpot", "p99_itl_ms": "itl"}
    blocks: list[Block] = [
        Table("Which mode wins at which rates", ["by", "winner"], rows),
        Words(
            "Rates are compared where all modes were measured; between two of them the lines say "
            "where the winner changes. Of modes with as many good requests the one wins whose "
            "requests are furthest from their bounds."
        ),
    ]
    for metric, bound in names.items():
        most = getattr(asked.slo, bound)
        lines = [
            Series(
                s.mode.name,
                *_line(
                    [t for t in study.trials(s.mode) if t.rate in study.rates],
                    lambda trial, key=metric: trial.numbers[key],
                ),
            )
            for s in standings
        ]
        if not any(y is not None and y > 0 for line in lines for y in line.ys):
            continue
        title = METRICS[metric].removeprefix("lowest ")
        blocks.append(
            Figure(
                LineChart(
                    f"{title} over rate",
                    _RATE,
                    Axis(f"{title}, ms", log=True),
                    [Series(s.name, s.xs, [y or None for y in s.ys]) for s in lines],
                    levels=[] if most is None else [(most * 1e3, "bound")],
                )
            )
        )
    return blocks


def _grid(study: Study, asked: Asked) -> list[Block]:
    cells = study.cells(asked.scales)
    bounds = asked.slo
    rates = ", ".join(f"{rate:.3g}" for rate in study.rates)
    heads = ["bound on the first token"]
    heads += [f"others x {scale:g}{_scaled(bounds.tpot, scale, 'TPOT')}" for scale in asked.scales]
    rows = [
        [
            f"x {row[0].scale.ttft:g}{_scaled(bounds.ttft, row[0].scale.ttft, 'TTFT')}",
            *map(cell_text, row),
        ]
        for row in cells
    ]
    return [
        Table("The winner under each SLO, and its capacity goodput", heads, rows),
        Words(
            "Capacities of scaled SLOs are the highest of the rates that hold and at which all "
            f"modes were measured, {rates} a second: they are as fine as those rates lie apart, "
            "and modes between which none of them lies tie. They are judged by the runs above, in "
            "which policies that go by a request's SLO (conditional placement, early rejection) "
            "went by the unscaled one."
        ),
    ]


def _scaled(bound: float | None, scale: float, name: str) -> str:
    return "" if bound is None else f" ({name} {bound * 1e3 * scale:.3g} ms)"


def _limits(study: Study, standings: Seq[Standing]) -> list[Block]:
    blocks: list[Block] = [
        Words("Each at the first rate that it does not hold, from the spans of its steps.")
    ]
    for each in standings:
        found = at_its_limit(study, each)
        blocks.append(Words(f"{each.mode.name}: held back by {found.name}."))
        blocks.append(Points(found.sentences))
    return blocks


def _costs(asked: Asked) -> list[Block]:
    calibration = asked.calibration
    link = calibration.link
    rows = [
        [point.case, point.kind, point.measured * 1e3, point.fitted * 1e3, f"{point.error:+.1%}"]
        for point in calibration.points
    ]
    facts = {f"source {n}": source for n, source in enumerate(calibration.sources, start=1)}
    if link is not None:
        facts["link"] = f"{link.bandwidth / 1e9:.4g} GB/s after {link.latency * 1e3:.3g} ms"
    facts["workload"] = ", ".join(f"{k}={v}" for k, v in asked.workload.items()) or "the usual one"
    return [
        Points(calibration.validity()),
        Table(
            "Measured steps beside their fit",
            ["case", "step", "measured, ms", "fit, ms", "error"],
            rows,
        ),
        Facts("Where the numbers come from", facts),
    ]
