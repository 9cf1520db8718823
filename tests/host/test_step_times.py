"""The line that an engine's step times are taken to lie on."""

import random
from math import inf

import pytest

from pdjax.host.step_times import StepTimes, prefill_seconds


def fitted(*measured: tuple[int, float]) -> StepTimes:
    times = StepTimes()
    for size, seconds in measured:
        times.add(size, seconds)
    return times


def test_nothing_is_known_before_a_step():
    times = StepTimes()
    assert not times.measured and times.line() == (0.0, 0.0)
    assert times.seconds(100) is None
    assert prefill_seconds(times, 512, 100) is None


def test_steps_on_a_line_give_the_line():
    times = fitted(*((size, 0.004 + 2e-5 * size) for size in (1, 700, 8192, 64)))
    assert times.line() == pytest.approx((0.004, 2e-5))
    assert times.seconds(4096) == pytest.approx(0.004 + 2e-5 * 4096)


def test_noise_averages_out():
    chance = random.Random(0)
    sizes = [chance.randint(1, 8192) for _ in range(2000)]
    times = fitted(*((size, 0.01 + 1e-5 * size + chance.gauss(0, 1e-3)) for size in sizes))
    assert times.seconds(4096) == pytest.approx(0.01 + 1e-5 * 4096, rel=0.02)


def test_steps_of_one_size_say_nothing_of_others():
    assert fitted((512, 0.02), (512, 0.04)).line() == pytest.approx((0.03, 0.0), rel=0.01)
    assert fitted(*[(4096, 0.05)] * 10_000).line() == pytest.approx((0.05, 0.0))


def test_no_part_is_below_zero():
    assert fitted((1, 0.02), (2, 0.01)).line()[1] == 0.0
    base, each = fitted((1, 0.0), (2, 1.0)).line()
    assert base == 0.0 and each > 0


def test_an_engine_that_has_become_slow_is_known_to_be():
    times = fitted(*((size, 1e-5 * size) for size in (100, 900) * 500))
    for size in (100, 900) * 500:
        times.add(size, 5e-5 * size)
    assert times.seconds(1000) == pytest.approx(0.05, rel=0.01)


def test_a_prompt_takes_as_many_steps_as_its_budget_says():
    times = fitted(*((size, 0.01 + 1e-3 * size) for size in (1, 10)))
    assert prefill_seconds(times, 10, 25) == pytest.approx(0.03 + 0.025)
    assert prefill_seconds(times, 10, 0) == 0.0


def test_the_size_that_takes_so_long():
    assert StepTimes().within(0.1) == inf
    on_a_line = fitted(*((size, 0.01 + 0.001 * size) for size in (1, 20, 30)))
    assert on_a_line.within(0.02) == pytest.approx(10)
    assert on_a_line.within(0.005) == 0
    one_size = fitted((100, 0.02), (100, 0.02))
    assert one_size.within(0.01) == pytest.approx(50)
    assert one_size.within(0.03) == pytest.approx(150)
    free = fitted((1, 0.0), (100, 0.0))
    assert (free.within(0.0), free.within(-1.0)) == (inf, 0)
