"""Lines for a terminal, of trials that are known."""

from pdjax.explain.text import trial_lines
from tests.explain.made import APART, outcome, trial


def test_each_latency_says_which_statistics_it_has():
    head, line = trial_lines([trial(APART, 4.0, [outcome()], p99_itl_ms=1234.0)])
    for metric in ("TTFT", "TPOT", "ITL"):
        assert f"{metric} p50 / p90 / p99, ms" in head
    assert line.startswith("1P1D  1 of 1") and line.endswith("1 / 1 / 1,234")
