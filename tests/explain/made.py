"""Made-up modes, trials and loads, for comparisons that can be worked out by hand."""

from dataclasses import replace

from pdjax.config import Config
from pdjax.core.slo import SLO
from pdjax.explain.load import Load, Role
from pdjax.explain.modes import Variant
from pdjax.explain.trial import SHOWN, Outcome, Trial
from pdjax.host.metrics.request import PHASES

BOUNDS = SLO(ttft=0.3, tpot=0.01)
APART = Variant("1P1D", "disaggregated", Config())
MIXED = Variant("2 x mixed 512", "mixed", Config(colocated=True))

LOAD = Load(
    seconds=10.0,
    roles=(Role("prefill", (0.5,), (100,)), Role("decode", (0.9,), (50,))),
    rows=8.0,
    most_rows=64,
    tick=0.005,
    held_up=0.0,
    phases=dict.fromkeys(PHASES, 0.0),
    queue_p90=0.0,
    row_wait_p90=0.0,
    wire=0.0,
    exposed=0.0,
    moved=0.0,
    preemptions=0,
)


def outcome(ttft: float = 0.1, tpot: float = 0.005, queue: float = 0.0) -> Outcome:
    return Outcome(True, ttft, tpot, ttft + 100 * tpot, tpot, queue, BOUNDS)


LOST = Outcome(False, None, None, None, None, None, BOUNDS)
REFUSED = replace(LOST, shed=True)


def trial(
    mode: Variant, rate: float, outcomes: list[Outcome], load: Load = LOAD, **numbers: float
) -> Trial:
    known = dict.fromkeys(SHOWN, 1.0) | numbers
    return Trial(mode, rate, known, tuple(outcomes), load)


def phased(load: Load = LOAD, **changes: float) -> Load:
    """A load with other phases, `decode=` and so on; underscores stand for blanks."""
    given = {name.replace("_", " "): seconds for name, seconds in changes.items()}
    return replace(load, phases={**load.phases, **given})
