"""What experiments that play workloads to modes say of their outcome."""

from typing import Any

from experiments.common.study_files import Outcome, warnings_of


def test_a_workload_that_is_too_short_is_warned_of():
    def outcome(**more: Any) -> Outcome:
        held = {"rate": 20.0, "slo_total": 200, "slo_attainment": 0.95, "median_e2el_ms": 2000.0}
        lost = held | {"rate": 40.0, "slo_attainment": 0.5}
        return Outcome("", [], {"points": [held | more, lost]}, {}, [], {})

    [told] = warnings_of(outcome())
    assert told.startswith("At 20 requests a second: Requests came for 10.0 s at that rate, only 5")
    assert "400 requests say more (--requests)" in told
    # Of two seeds, each has half of the requests.
    assert "only 2.5 times" in warnings_of(outcome(runs=2))[0]
    assert not warnings_of(outcome(median_e2el_ms=900.0))
    assert not warnings_of(Outcome("", [], {}, {}, [], {}))
