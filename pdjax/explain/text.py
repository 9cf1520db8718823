"""A comparison for a terminal."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from pdjax.explain.study import ATTAINMENT, LOWEST, Cell, Reign, Standing, Study
from pdjax.explain.trial import SHOWN, Trial

METRICS = {
    ATTAINMENT: "most good requests",
    "p90_ttft_ms": "lowest TTFT p90",
    "p90_tpot_ms": "lowest TPOT p90",
    "p99_itl_ms": "lowest ITL p99",
}
"""What winners have, by metric."""
assert set(METRICS) == {ATTAINMENT, *LOWEST}
PARTS = ("p50", "p90", "p99")
"""The statistics of a latency in `SHOWN`, in its order."""
_NAMED = 2
"""Modes of a tie that are named."""


def standings_lines(standings: Seq[Standing]) -> list[str]:
    """A line for each mode: its capacity, with numerator and denominator."""
    rows = [["mode", "capacity", "good", "next rate", "good"]]
    for each in standings:
        best, worse = each.found.best, each.found.next
        rows.append(
            [
                each.mode.name,
                "none" if best is None else f"{best.rate:.3g}/s",
                "" if best is None else f"{best.good} of {best.total}",
                "" if worse is None else f"{worse.rate:.3g}/s",
                "" if worse is None else f"{worse.good} of {worse.total}",
            ]
        )
    return aligned(rows)


def trial_lines(trials: Iterable[Trial]) -> list[str]:
    """A line for each trial: attainment, and latencies in milliseconds."""
    parts = " / ".join(PARTS)
    rows = [["mode", "good", *(f"{metric} {parts}, ms" for metric in ("TTFT", "TPOT", "ITL"))]]
    for trial in trials:
        _, good, total = trial.point()
        values = [trial.numbers[key] for key in SHOWN]
        cells = [" / ".join(map(_ms, values[n : n + 3])) for n in (0, 3, 6)]
        rows.append([trial.mode.name, f"{good} of {total}", *cells])
    return aligned(rows)


def reign_lines(study: Study) -> list[str]:
    """A line for each metric: which mode wins at which rates."""
    rows = [[METRICS[metric], reigns_of(study.reigns(metric))] for metric in METRICS]
    return aligned(rows)


def reigns_of(reigns: Seq[Reign]) -> str:
    """Which mode wins at which rates."""
    return "; ".join(f"{reign.winner} ({reign.start:.3g} to {reign.end:.3g}/s)" for reign in reigns)


def cell_lines(cells: Seq[Seq[Cell]]) -> list[str]:
    """A line for each scale of the first token's bound."""
    heads = [f"others x {cell.scale.tpot:g}" for cell in cells[0]]
    rows = [["TTFT bound", *heads]]
    rows += [[f"x {row[0].scale.ttft:g}", *map(cell_text, row)] for row in cells]
    return aligned(rows)


def cell_text(cell: Cell) -> str:
    """What wins under an SLO, and its capacity."""
    if cell.rate is None:
        return "nothing"
    named = [mode.name for mode in cell.winners[:_NAMED]]
    if more := len(cell.winners) - len(named):
        named.append(f"{more} more")
    tie = "tie of " if len(cell.winners) > 1 else ""
    least = "≥ " if cell.at_least else ""
    return f"{tie}{', '.join(named)} ({least}{cell.rate:.3g}/s)"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines, the cells of a column under one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
