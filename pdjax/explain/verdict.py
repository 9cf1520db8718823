"""Whether to disaggregate, in sentences with numbers."""

import math
from collections import Counter
from collections.abc import Sequence as Seq

from pdjax.bench.steady_state import ENOUGH, too_short
from pdjax.explain.bottleneck import Bottleneck, bottleneck
from pdjax.explain.study import Cell, Standing, Study


def verdict(study: Study, resolution: float) -> str:
    """The answer, from the capacities of the best mode with chips for each phase and of the best
    colocated one. Where the workload is too short for a steady state, that comes first.

    Args:
      resolution: to which capacities are known; a difference of twice as much says nothing.
    """
    standings = study.standings()
    best = standings[0]
    if not best.rate:
        return _nothing_holds(study, standings)
    answer, why = _answer(standings, resolution)
    if study.trial(best.mode, best.rate).lives < ENOUGH:
        answer = "Too short to say"
    return f"{answer}: {why}" if answer else why


def _answer(standings: Seq[Standing], resolution: float) -> tuple[str, str]:
    """In a word or a few, none where nothing was compared, and by which numbers."""
    best = standings[0]
    apart = next((each for each in standings if each.mode.apart), None)
    together = next((each for each in standings if not each.mode.apart), None)
    if apart is None or together is None:
        return "", f"{_holds(best)}; no mode of the other way to serve was compared with it."
    answer = "Yes" if best is apart else "No"
    other = together if best is apart else apart
    if not other.rate:
        return answer, f"{_holds(best)}; {other.mode.name} and its like hold none."
    ratio = best.rate / other.rate
    if ratio <= 1 + 2 * resolution:
        return "It makes little difference", (
            f"{_holds(apart)}, {_holds(together)}, and capacities are known to {resolution:.0%}."
        )
    how = "the best colocated mode" if best is apart else "the best disaggregated mode"
    return answer, (
        f"{_holds(best)}, {ratio:.2f} times the {other.rate:.3g} of {how}, {other.mode.name}."
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


def warnings(study: Study) -> list[str]:
    """Sentences about what the workload is too short to say."""
    best = study.standings()[0]
    if not best.rate:
        return []
    trial = study.trial(best.mode, best.rate)
    count = len(trial.outcomes)
    found = []
    short = too_short(count, trial.rate, count / trial.rate / trial.lives, "num_prompts")
    if short is not None:
        found.append(short)
    error = math.sqrt(study.share * (1 - study.share) / count)
    if error > 0.02:
        found.append(
            f"Of {count} requests, a share of {study.share:.0%} has a standard error of "
            f"{error * 100:.1f} points: compare several seeds."
        )
    return found


def around(cells: Seq[Seq[Cell]]) -> str:
    """A sentence about which kinds of modes win under the SLOs of a grid."""
    every = [cell for row in cells for cell in row]
    kinds = [{mode.kind for mode in cell.winners} for cell in every]
    won = Counter(kind for each in kinds if len(each) == 1 for kind in each)
    parts = [(f"{kind} wins", count) for kind, count in won.most_common()]
    parts.append(("kinds tie in", sum(len(each) > 1 for each in kinds)))
    parts.append(("nothing holds", sum(not each for each in kinds)))
    told = [f"{what} {count}" for what, count in parts if count]
    if len(every) == 1:
        return f"Of the one SLO of the grid, {told[0]}."
    return f"Of {len(every)} SLOs around this one, {', '.join(told)}."


def at_its_limit(study: Study, standing: Standing) -> Bottleneck:
    """What holds a mode back at the first rate that it does not hold, or at the highest that was
    measured."""
    worse = standing.found.next
    trials = study.trials(standing.mode)
    at = trials[-1] if worse is None else next(t for t in trials if t.rate == worse.rate)
    return bottleneck(at)
