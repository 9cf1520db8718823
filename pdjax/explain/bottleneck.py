"""What holds a mode back at a rate, in a name and in sentences with numbers."""

from dataclasses import dataclass

from pdjax.explain.load import DECODE, MIXED, PREFILL, Load
from pdjax.explain.trial import Outcome, Trial

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


def bottleneck(trial: Trial) -> Bottleneck:
    """Of the requests that were not good, which bound most of them missed, and what that part of
    their time went on. Where all were good, nothing holds the mode back."""
    missed = [each for each in trial.outcomes if not each.good()]
    late = [each for each in missed if each.late()]
    slow = [each for each in missed if each.completed and not each.late()]
    name = NOTHING
    if missed:
        name = (
            _of_first_tokens(late) if len(late) >= len(slow) else _of_later_ones(trial.load, slow)
        )
    return Bottleneck(
        name,
        (
            _misses(trial, missed, late, slow),
            *_why(name, trial.load),
            *_engines(trial.load),
            *_transfer(trial.load),
        ),
    )


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


def _misses(trial: Trial, missed: list[Outcome], late: list[Outcome], slow: list[Outcome]) -> str:
    total = len(trial.outcomes)
    if not missed:
        return f"All {total} requests are good at {trial.rate:.3g} a second."
    lost = len(missed) - len(late) - len(slow)
    told = f"{len(missed)} of {total} requests are not good at {trial.rate:.3g} a second: "
    parts = [f"{len(late)} have their first token too late", f"{len(slow)} the others too slowly"]
    if lost:
        parts.append(f"{lost} were not served")
    return told + ", ".join(parts) + "."


def _why(name: str, load: Load) -> list[str]:
    """The sentence about what holds it back."""
    queue, prefill = load.phases["queue"] * 1e3, load.phases["prefill"] * 1e3
    rows = "" if load.rows is None else f"{load.rows:.1f} of {load.most_rows} rows"
    tick = "" if load.tick is None else f"{load.tick * 1e3:.1f} ms"
    told = {
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
