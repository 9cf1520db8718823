"""What holds a mode back, from outcomes and loads that are known."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pdjax.bench.simulated import play
from pdjax.core.ids import EngineId
from pdjax.core.slo import SLO
from pdjax.explain.bottleneck import (
    FAILED,
    NOTHING,
    PREFILL_BUSY,
    QUEUE,
    ROWS,
    SHED,
    STEPS,
    TICKS,
    TRANSFER,
    bottleneck,
)
from pdjax.explain.load import Load, Role, _by_chip, _held_up, _roles, turns_of
from pdjax.explain.model import spec_of
from pdjax.explain.modes import variants
from pdjax.explain.trial import Simulator
from pdjax.host.handoff.accounting import TransferTotals
from pdjax.host.metrics.request import RequestMetrics
from pdjax.host.metrics.work import Span
from pdjax.sim.calibration import Calibration
from pdjax.workloads.arrival import Arrival
from tests.explain.made import APART, LOAD, LOST, REFUSED, outcome, phased, trial
from tests.sim.test_replicas import replicas

GOOD, SLOW = outcome(), outcome(tpot=0.02)
LATE_IN_QUEUE, LATE_TO_COMPUTE = outcome(ttft=0.9, queue=0.8), outcome(ttft=0.9, queue=0.1)


@pytest.mark.parametrize(
    ("outcomes", "load", "name"),
    [
        ([GOOD], LOAD, NOTHING),
        ([GOOD, LATE_IN_QUEUE], LOAD, QUEUE),
        ([GOOD, LATE_TO_COMPUTE], LOAD, PREFILL_BUSY),
        ([LATE_IN_QUEUE, LATE_IN_QUEUE, SLOW], LOAD, QUEUE),
        ([SLOW], replace(LOAD, tick=0.011), TICKS),
        ([SLOW], phased(replace(LOAD, held_up=0.5), decode=1.0), STEPS),
        ([SLOW], phased(replace(LOAD, held_up=0.1), decode=1.0, wait_for_row=0.5), ROWS),
        ([SLOW], phased(replace(LOAD, exposed=0.7), decode=1.0), TRANSFER),
        ([SLOW], LOAD, TICKS),
        ([GOOD, REFUSED], LOAD, SHED),
        ([REFUSED, REFUSED, LATE_IN_QUEUE, LATE_IN_QUEUE, SLOW], LOAD, SHED),
        ([REFUSED, LATE_IN_QUEUE, LATE_IN_QUEUE, SLOW], LOAD, QUEUE),
        ([LOST], LOAD, FAILED),
    ],
)
def test_the_name_follows_from_what_was_missed(outcomes, load: Load, name: str):
    assert bottleneck(trial(APART, 4.0, outcomes, load)).name == name


def test_sentences_have_the_numbers():
    load = replace(phased(LOAD, queue=0.12, prefill=0.048), queue_p90=0.5, moved=268e6, wire=9e-4)
    found = bottleneck(trial(APART, 4.0, [GOOD, LATE_IN_QUEUE, SLOW, LOST], load))
    told = " ".join(found.sentences)
    assert (
        "3 of 4 requests are not good at 4 a second: 1 failed, 1 have their first token too late, "
        "1 the others too slowly." in told
    )
    assert "waits 120 ms for its first chunk, one in ten 500 ms" in told
    assert "computed for 48 ms" in told and "Prefill steps have their chips 50% of the time" in told
    assert "268 MB of KV a request are on the wire for 0.90 ms" in told
    assert "8.0 of 64 rows active" in told


def test_what_is_shed_is_neither_late_nor_slow():
    mode = replace(APART, config=replace(APART.config, max_waiting=1))
    found = bottleneck(trial(mode, 4.0, [GOOD] + [REFUSED] * 6))
    assert found.sentences[0] == (
        "6 of 7 requests are not good at 4 a second: 6 were shed, 0 have their first token too "
        "late, 0 the others too slowly."
    )
    assert found.sentences[1].startswith("A request is shed where 1 wait already; one that is")
    policies = replace(mode.config.policies, admission="early_rejection")
    mode = replace(mode, config=replace(mode.config, policies=policies))
    told = bottleneck(trial(mode, 4.0, [REFUSED])).sentences[1]
    assert "wait already or its tokens are expected too late;" in told


@pytest.mark.parametrize("bounds", [SLO(e2el=5.0), SLO(ttft=5.0)])
def test_a_full_queue_sheds_whatever_the_bounds_are_on(bounds: SLO):
    """Of ten requests at once one waits."""
    config = replace(APART.config, max_waiting=1)
    mode = variants(config, 2, [], ["disaggregated"])[0]
    calibration = Calibration.load("h200")
    simulator = Simulator(calibration, spec_of(config, calibration, True), bounds, 2048)
    made = simulator.run(mode, 10.0, [Arrival(0.0, 1000, 4)] * 10)
    assert sum(each.shed for each in made.outcomes) > 5
    assert bottleneck(made).name == SHED


def span(track: str, name: str, start: float, end: float, **counts: int) -> Span:
    return Span(track, name, start, end, counts)


def test_a_step_that_was_dispatched_ahead_has_the_chip_when_the_one_before_ends():
    spans = [span("decode/0", "tick", 0, 2), span("decode/0", "tick", 0.5, 4)]
    assert [turn.seconds for turn in turns_of(spans)] == [2, 2]


def test_chunks_and_rows_of_a_mixed_step_have_the_chip_together():
    spans = [span("mixed/0", "tick", 0, 2), span("mixed/0", "step", 0, 2)]
    [turn] = turns_of(spans)
    assert turn.seconds == 2 and turn.has("tick") and turn.has("step")


def cluster(pools: dict[str, str], spans: list[Span]) -> SimpleNamespace:
    engines = {EngineId(id): SimpleNamespace(pool=pool) for id, pool in pools.items()}
    return SimpleNamespace(engines=engines, recorder=SimpleNamespace(spans=lambda: spans))


def decoded(start: float, *tokens: float, first: float = 0.0) -> RequestMetrics:
    """A request with a first token, a row from `start` on, and tokens of ticks."""
    marks = [("arrived", 0.0), ("prefilled", first), ("decoding", start), ("first_tick", start)]
    marks.append(("finished", tokens[-1]))
    times = first, *tokens
    return RequestMetrics("r", 0.0, tuple(marks), times, 9, 0, TransferTotals(), "length")


def test_roles_of_one_chip_share_its_time():
    spans = [
        span("decode/0", "tick", 0, 1, rows_active=3),
        span("prefill/0", "step", 0, 3, tokens=100),  # waits for the tick
        span("decode/0", "tick", 1, 4, rows_active=4),  # waits for the step
    ]
    made = cluster({"prefill/0": "hbm/0", "decode/0": "hbm/0"}, spans)
    chips = _by_chip(made)  # type: ignore[arg-type]
    prefill, decode = _roles(made, chips, 8.0)  # type: ignore[arg-type]
    assert prefill == Role("prefill", (0.25,), (100,))
    assert decode == Role("decode", (0.25,), (7,))
    assert _held_up(chips, [decoded(0, 1, 4)]) == 0.5
    assert _held_up(chips, [decoded(0, 1), decoded(3, 4, first=3)]) == 0.0
    assert _held_up(chips, [decoded(0, 1), decoded(2, 4, first=2)]) == 1 / 3
    assert _held_up(chips, []) == 0.0


def test_a_step_holds_up_the_rows_of_its_own_chip():
    spans = [
        span("mixed/0", "step", 0, 2, tokens=100),
        span("mixed/1", "tick", 0, 2.5, rows_active=1),
        span("mixed/0", "tick", 2, 3, rows_active=1),
    ]
    made = cluster({"mixed/0": "hbm/0", "mixed/1": "hbm/1"}, spans)
    chips = _by_chip(made)  # type: ignore[arg-type]
    assert _held_up(chips, [decoded(0, 2.5), decoded(2, 3, first=2)]) == 0.0


def test_chips_apart_hold_up_nobody():
    spans = [
        span("prefill/0", "step", 0, 3, tokens=100),
        span("decode/0", "tick", 1, 4, rows_active=4),
    ]
    made = cluster({"prefill/0": "hbm/p", "decode/0": "hbm/d"}, spans)
    chips = _by_chip(made)  # type: ignore[arg-type]
    assert _held_up(chips, [decoded(1, 4)]) == 0.0


@pytest.mark.parametrize("mixed_budget", [None, 64])
def test_requests_that_are_alone_wait_for_no_steps(mixed_budget: int | None):
    """Three of them, far apart, on two replicas; where they overlap they do."""
    for apart in (100.0, 0.5):
        served = replicas(2, mixed_budget)
        arrivals = [Arrival(apart * n, 100, 20, id=f"r{n}") for n in range(3)]
        load = Load.of(served, play(served, arrivals))
        assert load.rows is not None and load.phases["decode"] > 1.0
        assert (load.held_up > 0) == (apart < 1.0)


def test_imbalance_is_the_most_over_the_mean():
    assert Role("prefill", (0.5, 0.1), (300, 100)).imbalance == 1.5
    assert Role("prefill", (0.5,), (300,)).imbalance == 1.0
    assert Role("prefill", (0.0, 0.0), (0, 0)).imbalance == 1.0
