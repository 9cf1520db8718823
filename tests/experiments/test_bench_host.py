"""The benchmark of the host: every row decodes while it is timed."""

import pytest

from experiments.bench_host import __main__ as bench_host
from experiments.bench_host.waiting import Load, Situation, measure, waiting_table
from pdjax.config import PoliciesConfig


def test_the_host_is_timed_while_every_row_decodes():
    coordinator = bench_host.decoding(rows=6, stages=2, prompt=5, steps=20)
    times = bench_host.step_seconds(coordinator, 20)
    assert len(times) == 20 and times == sorted(times)
    told = [len(coordinator.step()) for _ in range(4)]
    assert told == [3, 3, 3, 3]  # a microbatch a tick


@pytest.mark.parametrize(
    "policies",
    [
        PoliciesConfig(),
        PoliciesConfig(
            prefill="fair", decode="prefill_order", router="cost_based", admission="early_rejection"
        ),
    ],
    ids=["default", "others"],
)
def test_the_queue_stays_as_long_as_it_is_to_be(policies):
    load = Load(Situation(2, 8, waiting=20, prompt=8, output=8, policies=policies))
    load.fill()
    times = [time for _ in range(100) for time in load.turn()]
    assert len(times) >= 10 and all(time > 0 for time in times)
    assert len(load.cluster.coordinator.loop.lifecycle.waiting) >= 12
    assert {each.finish_reason for each in load.cluster.recorder.requests()} == {"length"}


def test_equal_runs_take_equal_steps():
    found = measure(Situation(1, 4, waiting=2, prompt=8, output=8), steps=10, runs=2)
    assert 10 <= found["steps"] < 20 and 0 < found["rows"] <= 4
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert waiting_table([found]).splitlines()[0].startswith("waiting")
