"""Whether to disaggregate, in sentences with numbers."""

import math
from collections import Counter
from collections.abc import Sequence as Seq

from pdjax.explain.bottleneck import Bottleneck, bottleneck
from pdjax.explain.study import Cell, Standing, Study


def verdict(study: Study, resolution: float) -> str:
    """The answer, from the capacities of the best mode with chips for each phase and of the best
    colocated one.

    Args:
      resolution: to which capacities are known; a difference of twice as much says nothing.
    """
    standings = study.standings()
    best = standings[0]
    if not best.rate:
        return _nothing_holds(study, standings)
    apart = next((each for each in standings if each.mode.apart), None)
    together = next((each for each in standings if not each.mode.apart), None)
    if apart is None or together is None:
        return f"{_holds(best)}; no mode of the other way to serve was compared with it."
    other = together if best is apart else apart
    if not other.rate:
        answer = "Yes" if best is apart else "No"
        return f"{answer}: {_holds(best)}; {other.mode.name} and its like hold none."
    ratio = best.rate / other.rate
    if ratio <= 1 + 2 * resolution:
        return (
            f"It makes little difference: {_holds(apart)}, {_holds(together)}, and capacities are "
            f"known to {resolution:.0%}."
        )
    how = "the best colocated mode" if best is apart else "the best disaggregated mode"
    answer = "Yes" if best is apart else "No"
    return (
        f"{answer}: {_holds(best)}, {ratio:.2f} times the {other.rate:.3g} of {how}, "
        f"{other.mode.name}."
    )


def _holds(standing: Standing) -> str:
    return f"{standing.mode.name} holds {standing.rate:.3g} requests a second within the SLO"


def _nothing_holds(study: Study, standings: Seq[Standing]) -> str:
    rate = min(trial.rate for each in standings for trial in study.trials(each.mode))
    lowest = [study.trials(each.mode)[0] for each in standings]
    first = max(lowest, key=lambda trial: trial.attainment)
    _, good, total = first.point()
    return (
        f"No mode holds this SLO at any rate, down to {rate:.3g} requests a second: "
        f"{first.mode.name} serves {good} of {total} requests within it, and {study.share:.0%} are "
        "asked for."
    )


ENOUGH = 10
"""Lives of requests that a run should be long."""


def warnings(study: Study) -> list[str]:
    """Sentences about what the workload is too short to say."""
    best = study.standings()[0]
    if not best.rate:
        return []
    trial = study.trial(best.mode, best.rate)
    count = len(trial.outcomes)
    found = []
    if trial.lives < ENOUGH:
        more = math.ceil(count * ENOUGH / trial.lives / 10) * 10
        found.append(
            f"Requests came for {count / trial.rate:.1f} s at that rate, only {trial.lives:.1f} "
            "times as long as one of them takes: engines were still filling up, and capacities may "
            f"be too high. {more} requests say more (--num_prompts)."
        )
    error = math.sqrt(study.share * (1 - study.share) / count)
    if error > 0.02:
        found.append(
            f"Of {count} requests, a share of {study.share:.0%} has a standard error of "
            f"{error * 100:.1f} points: compare several seeds."
        )
    return found


def around(cells: Seq[Seq[Cell]], kinds: dict[str, str]) -> str:
    """A sentence about which kinds of modes win under the SLOs of a grid.

    Args:
      kinds: of modes, by their names.
    """
    every = [cell for row in cells for cell in row]
    won = Counter(kinds[cell.winner] for cell in every if cell.winner is not None)
    parts = [f"{kind} wins {count}" for kind, count in won.most_common()]
    if lost := sum(cell.winner is None for cell in every):
        parts.append(f"nothing holds {lost}")
    return f"Of {len(every)} SLOs around this one, {', '.join(parts)}."


def at_its_limit(study: Study, standing: Standing) -> Bottleneck:
    """What holds a mode back at the first rate that it does not hold, or at the highest that was
    measured."""
    worse = standing.found.next
    trials = study.trials(standing.mode)
    at = trials[-1] if worse is None else next(t for t in trials if t.rate == worse.rate)
    return bottleneck(at)
