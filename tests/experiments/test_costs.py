"""Costs of simulated steps, fitted to steps whose times are known."""

import pytest

from experiments.common.costs import (
    Chip,
    MeasuredStep,
    fit_costs,
    prefill_seconds,
    tick_seconds,
)
from pdjax.sim.costs import StepCosts


def test_a_fit_finds_the_constants_that_steps_were_made_of():
    true = StepCosts(1e-3, 2e-5, 3e-6, 4e-3, 1e-5, 3e-8)
    shapes = [(1, 1000), (16, 1000), (64, 90_000), (100, 9_000)]
    ticks = [MeasuredStep(*each, tick_seconds(true, MeasuredStep(*each, 0))) for each in shapes]
    steps = [MeasuredStep(*each, prefill_seconds(true, MeasuredStep(*each, 0))) for each in shapes]
    found = fit_costs(ticks, steps)
    for name in ("tick", "tick_row", "tick_kv_token", "prefill_step", "prefill_token"):
        assert getattr(found, name) == pytest.approx(getattr(true, name))
    assert found.prefill_kv_token == pytest.approx(true.prefill_kv_token)


def test_no_constant_is_negative_and_one_step_is_enough():
    falling = [MeasuredStep(1, 10, 2e-3), MeasuredStep(10, 100, 1e-3)]
    found = fit_costs(falling, falling[:1])
    assert min(found.tick, found.tick_row, found.tick_kv_token) >= 0 and found.tick > 0
    assert prefill_seconds(found, falling[0]) == pytest.approx(2e-3)
    with pytest.raises(ValueError, match="0 ticks, 2 prefill steps"):
        fit_costs([], falling)


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_measured_steps_are_met_within_five_percent(name: str):
    chip = Chip.load(name)
    assert len(chip.ticks) >= 5 and len(chip.prefills) >= 5
    for tick in chip.ticks:
        assert tick_seconds(chip.costs, tick) == pytest.approx(tick.seconds, rel=0.05)
    for step in chip.prefills:
        assert prefill_seconds(chip.costs, step) == pytest.approx(step.seconds, rel=0.05)
    assert "not measured" in " ".join(chip.validity())


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match="costs='v5e': allowed are h100, h200"):
        Chip.load("v5e")
