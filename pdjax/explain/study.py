"""Modes compared: capacity goodput, what wins at which rate and under which SLO."""

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

from pdjax.explain.modes import Variant
from pdjax.explain.trial import Scale, Trial
from pdjax.host.metrics.capacity import Capacity, Point, capacity, find_capacity

ATTAINMENT = "attainment"
LOWEST = ("p90_ttft_ms", "p90_tpot_ms", "p99_itl_ms")
"""Metrics by which modes are compared besides attainment; the lowest wins."""
_GRID = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2)
"""Rates at which all modes are compared, as parts of the highest capacity."""


class Reign(NamedTuple):
    """The rates at which a mode wins.

    Attributes:
      winner: the name of the mode.
      start, end: requests a second; the first begins and the last ends with what was measured.
    """

    winner: str
    start: float
    end: float


class Cell(NamedTuple):
    """What wins under an SLO.

    Attributes:
      scale: of the SLO.
      winners: the modes that hold most, several of a tie; none where none holds at any rate that
        was measured.
      rate: their capacity goodput, requests a second.
      at_least: whether a winner holds the highest rate that was measured, so that it may hold more.
      second: capacity goodput of the best mode of any other kind; None where none of it holds.
    """

    scale: Scale
    winners: tuple[Variant, ...]
    rate: float | None
    at_least: bool
    second: float | None


@dataclass(frozen=True)
class Standing:
    """How a mode stands.

    Attributes:
      mode: which.
      found: its capacity, with all points that were measured.
    """

    mode: Variant
    found: Capacity

    @property
    def rate(self) -> float:
        """Capacity goodput, requests a second; 0 where no rate holds."""
        return self.found.best.rate if self.found.best else 0.0


class Study:
    """Trials of modes at rates, each made once.

    Args:
      modes: that are compared.
      run: serves with a mode at a rate.
      share: of the requests that must be good.
      tell: is given a line for each trial.
    """

    def __init__(
        self,
        modes: Seq[Variant],
        run: Callable[[Variant, float], Trial],
        *,
        share: float = 0.9,
        tell: Callable[[str], object] = print,
    ) -> None:
        self.modes, self.share = tuple(modes), share
        self._run, self._tell = run, tell
        self._trials: dict[tuple[str, float], Trial] = {}

    def trial(self, mode: Variant, rate: float) -> Trial:
        """A mode at a rate."""
        key = mode.name, rate
        if key not in self._trials:
            self._trials[key] = found = self._run(mode, rate)
            _, good, total = found.point()
            self._tell(f"{mode.name} at {rate:.4g} requests/s: {good} of {total} good")
        return self._trials[key]

    def trials(self, mode: Variant) -> list[Trial]:
        """Those of a mode so far, by their rates."""
        own = [each for (name, _), each in self._trials.items() if name == mode.name]
        return sorted(own, key=lambda trial: trial.rate)

    def search(self, start: float, resolution: float) -> None:
        """Find the capacity of each mode by bisection of the rate, from `start` on."""
        for mode in self.modes:

            def measure(rate: float, mode: Variant = mode) -> Point:
                return self.trial(mode, rate).point()

            find_capacity(measure, start, self.share, resolution=resolution)

    def sweep(self, rates: Iterable[float]) -> None:
        """Measure all modes at the same rates."""
        for rate in rates:
            for mode in self.modes:
                self.trial(mode, rate)

    @property
    def grid(self) -> list[float]:
        """Rates that lie around the highest capacity, for a sweep; empty where no mode holds."""
        highest = max(standing.rate for standing in self.standings())
        return [float(f"{part * highest:.3g}") for part in _GRID] if highest else []

    @property
    def rates(self) -> list[float]:
        """Rates at which all modes were measured, in order."""
        rates = {rate for _, rate in self._trials}
        return sorted(
            rate for rate in rates if all((mode.name, rate) in self._trials for mode in self.modes)
        )

    def capacity(self, mode: Variant) -> Capacity:
        """Of a mode, from its trials so far."""
        return capacity((trial.point() for trial in self.trials(mode)), self.share)

    def standings(self) -> list[Standing]:
        """Of all modes, the best first; of equals, the one of fewer good requests at the first rate
        that does not hold comes later."""
        made = [Standing(mode, self.capacity(mode)) for mode in self.modes]
        return sorted(made, key=lambda each: (each.rate, _beyond(each.found)), reverse=True)

    def reigns(self, metric: str) -> list[Reign]:
        """Which mode wins at which rates.

        Args:
          metric: `ATTAINMENT`, or one of `LOWEST`. Of modes that serve as many good requests, the
            one wins whose first tokens and gaps are furthest from their bounds.

        Returns:
          in the order of rates; where the winner changes between two rates, the lines between them
          say where. Empty where fewer than two rates were measured for all modes.
        """
        rates = self.rates
        winners = [self._winner(metric, rate) for rate in rates]
        found = list[Reign]()
        start = rates[0] if rates else 0.0
        for low, high, before, after in zip(rates, rates[1:], winners, winners[1:], strict=False):
            if before is not after:
                change = self._crossing(metric, before, after, low, high)
                found.append(Reign(before.name, start, change))
                start = change
        return [*found, Reign(winners[-1].name, start, rates[-1])] if len(rates) > 1 else []

    def _winner(self, metric: str, rate: float) -> Variant:
        def key(mode: Variant) -> tuple[float, float]:
            trial = self.trial(mode, rate)
            if metric == ATTAINMENT:
                return trial.attainment, -strain(trial)
            value = trial.numbers[metric]
            return -math.inf if value is None else -value, 0.0

        return max(self.modes, key=key)

    def _crossing(
        self, metric: str, first: Variant, then: Variant, low: float, high: float
    ) -> float:
        """Where the lines of two modes cross between two rates; in the middle where they run
        together at one of them, and something else has decided."""

        def ahead(rate: float) -> float:
            of = [self.trial(mode, rate) for mode in (first, then)]
            if metric == ATTAINMENT:
                return of[0].attainment - of[1].attainment
            values = [trial.numbers[metric] for trial in of]
            return 0.0 if None in values else values[1] - values[0]

        before, after = ahead(low), ahead(high)
        if before > 0 > after:
            return low + (high - low) * before / (before - after)
        return (low + high) / 2

    def cells(self, scales: Seq[float]) -> list[list[Cell]]:
        """What wins under SLOs of scaled bounds: a row for each scale of the first token's, a cell
        for each of the others'. Scaled ones are judged by the `rates` at which all modes were
        measured, that of the SLO itself by the capacities that were searched for."""
        return [[self._cell(Scale(ttft, tpot)) for tpot in scales] for ttft in scales]

    def _cell(self, scale: Scale) -> Cell:
        if scale == Scale():
            found = self.standings()
        else:
            found = [Standing(mode, self._scaled(mode, scale)) for mode in self.modes]
        most = max(each.rate for each in found)
        if not most:
            return Cell(scale, (), None, False, None)
        first = [each for each in found if each.rate == most]
        kinds = {each.mode.kind for each in first}
        other = max((each.rate for each in found if each.mode.kind not in kinds), default=0.0)
        at_least = any(each.found.next is None for each in first)
        return Cell(scale, tuple(each.mode for each in first), most, at_least, other or None)

    def _scaled(self, mode: Variant, scale: Scale) -> Capacity:
        """Of a mode under the SLO times `scale`, from the rates that all modes have."""
        points = (self.trial(mode, rate).point(scale) for rate in self.rates)
        return capacity(points, self.share)

    def to_json(self, scales: Seq[float], chips: int) -> dict[str, Any]:
        """Plain values."""
        return {
            "modes": [
                {
                    "name": standing.mode.name,
                    "kind": standing.mode.kind,
                    "capacity": standing.found.to_json(chips),
                    "trials": [trial.to_json() for trial in self.trials(standing.mode)],
                }
                for standing in self.standings()
            ],
            "rates": self.rates,
            "winners": {
                metric: [reign._asdict() for reign in self.reigns(metric)]
                for metric in (ATTAINMENT, *LOWEST)
            },
            "slo_grid": [
                {
                    "ttft_scale": cell.scale.ttft,
                    "tpot_scale": cell.scale.tpot,
                    "winners": [mode.name for mode in cell.winners],
                    "rate": cell.rate,
                    "at_least": cell.at_least,
                    "best_of_another_kind": cell.second,
                }
                for row in self.cells(scales)
                for cell in row
            ],
        }


def strain(trial: Trial) -> float:
    """How near the requests of a trial come to their bounds: the mean over them of what is largest,
    their part of any bound."""
    parts = [
        max(
            (value / most for value, most in each.reached() if value is not None),
            default=0.0,
        )
        for each in trial.outcomes
    ]
    return sum(parts) / len(parts) if parts else 0.0


def _beyond(found: Capacity) -> float:
    """Share of good requests at the first rate that does not hold; 1 where all do."""
    worse = found.next
    return 1.0 if worse is None or not worse.total else worse.good / worse.total
