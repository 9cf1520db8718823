"""What holds a mode back at a rate, in a name and in sentences with numbers."""

from dataclasses import dataclass
from typing import NamedTuple

from pdjax.explain.load import DECODE, MIXED, PREFILL, Load
from pdjax.explain.trial import Outcome, Trial

SHED = "shedding"
FAILED = "requests that fail"
PREFILL_BUSY = "prefill"
QUEUE = "queueing for prefill"
STEPS = "steps that wait for prompts"
ROWS = "decode rows"
TICKS = "decode ticks"
TRANSFER = "the transfer of KV"
NOTHING = "nothing"


@dataclass(frozen=True)
class Bottleneck:
    """What holds a mode back.

    Attributes:
      name: in a few words.
      sentences: why, and what else the spans say.
    """

    name: str
    sentences: tuple[str, ...]


class Missed(NamedTuple):
    """Requests that were not good, each in one of the lists.

    Attributes:
      shed, failed: were not served.
      late: had their first token too late.
      slow: had it in time, and the others not.
    """

    shed: list[Outcome]
    late: list[Outcome]
    slow: list[Outcome]
    failed: list[Outcome]


def bottleneck(trial: Trial) -> Bottleneck:
    """Of the requests that were not good, what most of them missed: room, a bound, or a proper end;
    and what that part of their time went on. Of equals the first of these counts. Where all were
    good, nothing holds the mode back."""
    bad = [each for each in trial.outcomes if not each.good()]
    served = [each for each in bad if each.completed]
    missed = Missed(
        shed=[each for each in bad if each.shed],
        late=[each for each in served if each.late()],
        slow=[each for each in served if not each.late()],
        failed=[each for each in bad if not each.completed and not each.shed],
    )
    name = _name(missed, trial.load) if bad else NOTHING
    return Bottleneck(
        name,
        (
            _misses(trial, missed),
            *_why(name, trial),
            *_engines(trial.load),
            *_transfer(trial.load),
        ),
    )


def _name(missed: Missed, load: Load) -> str:
    most = max(missed, key=len)
    if most is missed.shed:
        return SHED
    if most is missed.failed:
        return FAILED
    return _of_first_tokens(most) if most is missed.late else _of_later_ones(load, most)


def _of_first_tokens(late: list[Outcome]) -> str:
    """Whether those that were late waited, or were long to compute."""
    waited = sum(each.queue or 0.0 for each in late)
    whole = sum(each.ttft if each.ttft is not None else each.queue or 0.0 for each in late)
    return QUEUE if waited >= whole / 2 else PREFILL_BUSY


def _of_later_ones(load: Load, slow: list[Outcome]) -> str:
    """What tokens after the first wait for: ticks, where these alone take as long as the bound,
    else what they wait for most: a row, KV, or steps with prompts."""
    bounds = [each.slo.tpot for each in slow if each.slo.tpot is not None]
    alone = load.tick or 0.0
    waits = {
        ROWS: load.phases["wait for row"],
        TRANSFER: load.exposed,
        STEPS: load.phases["decode"] * load.held_up,
    }
    most = max(waits, key=lambda name: waits[name])
    return TICKS if not waits[most] or (bounds and alone >= min(bounds)) else most


def _misses(trial: Trial, missed: Missed) -> str:
    total, bad = len(trial.outcomes), sum(map(len, missed))
    if not bad:
        return f"All {total} requests are good at {trial.rate:.3g} a second."
    parts = [
        *([f"{len(missed.shed)} were shed"] if missed.shed else []),
        *([f"{len(missed.failed)} failed"] if missed.failed else []),
        f"{len(missed.late)} have their first token too late",
        f"{len(missed.slow)} the others too slowly",
    ]
    return (
        f"{bad} of {total} requests are not good at {trial.rate:.3g} a second: {', '.join(parts)}."
    )


def _why(name: str, trial: Trial) -> list[str]:
    """The sentence about what holds it back."""
    load, config = trial.load, trial.mode.config
    early = config.policies.admission != "all"
    queue, prefill = load.phases["queue"] * 1e3, load.phases["prefill"] * 1e3
    rows = "" if load.rows is None else f"{load.rows:.1f} of {load.most_rows} rows"
    tick = "" if load.tick is None else f"{load.tick * 1e3:.1f} ms"
    told = {
        SHED: f"A request is shed where {config.max_waiting} wait already"
        f"{' or its tokens are expected too late' if early else ''}; one that is served waits "
        f"{queue:.0f} ms for its first chunk.",
        QUEUE: f"A request waits {queue:.0f} ms for its first chunk, one in ten "
        f"{load.queue_p90 * 1e3:.0f} ms and more, and is then computed for {prefill:.0f} ms.",
        PREFILL_BUSY: f"A prompt is computed for {prefill:.0f} ms, after {queue:.0f} ms of "
        "waiting: it is its own length that takes long.",
        STEPS: f"Steps with chunks of prompts take {load.held_up:.0%} of the time in which chips "
        f"have rows to decode, and these wait for them: a tick alone takes {tick}.",
        ROWS: f"A request waits {load.phases['wait for row'] * 1e3:.0f} ms for a decode row, one "
        f"in ten {load.row_wait_p90 * 1e3:.0f} ms and more, with {rows} active on average.",
        TICKS: f"A tick takes {tick} with {rows} active: more rows and longer contexts make it "
        "longer.",
        TRANSFER: f"A request waits {load.exposed * 1e3:.1f} ms for KV that is on its way.",
    }
    return [told[name]] if name in told else []


def _engines(load: Load) -> list[str]:
    """Sentences about how busy engines are, and how evenly."""
    busy = []
    for name, what in ((PREFILL, "Prefill"), (DECODE, "Decode"), (MIXED, "Mixed")):
        role = load.role(name)
        if role is not None:
            least, most = min(role.busy), max(role.busy)
            spread = "" if len(role.busy) == 1 else f" (each {least:.0%} to {most:.0%})"
            busy.append(
                f"{what} steps have their chips {role.utilisation:.0%} of the time{spread}."
            )
    if load.rows is not None:
        busy.append(f"A tick has {load.rows:.1f} of {load.most_rows} rows active.")
    if any(len(role.tokens) > 1 for role in load.roles):
        busy.append(
            f"The engine with the most to do has {load.imbalance:.2f} times the mean of its role."
        )
    if load.preemptions:
        busy.append(f"{load.preemptions} times a sequence gave up its KV and was computed again.")
    return busy


def _transfer(load: Load) -> list[str]:
    """A sentence about KV on its way."""
    if not load.moved:
        return []
    return [
        f"{load.moved / 1e6:.0f} MB of KV a request are on the wire for {load.wire * 1e3:.2f} ms, "
        f"and {load.exposed * 1e3:.2f} ms of that way are waited for."
    ]
