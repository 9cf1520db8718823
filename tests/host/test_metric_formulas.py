"""The formulas of a report against timestamps made by hand, whose answers are worked out here."""

import numpy as np
import pytest

from pdjax.core.slo import SLO
from pdjax.host.handoff.accounting import TransferTotals
from pdjax.host.metrics.request import RequestMetrics
from pdjax.host.metrics.summary import summarize


def made(
    name: str, arrival: float, *times: float, reason: str = "length", prompt: int = 10
) -> RequestMetrics:
    return RequestMetrics(name, arrival, (), times, prompt, 0, TransferTotals(), reason)


A = made("a", 1.0, 1.5, 1.7, 1.8, 2.1)  # ttft 0.5, tpot 0.2, gaps 0.2 0.1 0.3, e2e 1.1
B = made("b", 2.0, 3.0, 3.0, 3.0, 3.6, 3.6, 4.5)  # chunks of 3, 2 and 1 tokens
C = made("c", 4.0, 4.25, prompt=7)  # one token
FAILED = made("d", 0.5, 0.9, reason="error")
ABORTED = made("e", 0.6, 0.8, reason="abort")
SHED = made("f", 0.7, reason="shed")
EVERYONE = [FAILED, ABORTED, SHED, A, B, C]


def test_latencies_of_each_request():
    assert (A.ttft, A.tpot, A.e2e) == pytest.approx((0.5, 0.2, 1.1))
    assert A.itl == pytest.approx((0.2, 0.1, 0.3))
    assert (B.ttft, B.tpot, B.e2e) == pytest.approx((1.0, 0.3, 2.5))
    assert B.itl == pytest.approx((0.0, 0.0, 0.6, 0.0, 0.9))
    assert (C.ttft, C.tpot, C.itl, C.e2e) == (0.25, None, (), 0.25)


def test_statistics_are_of_completed_requests_and_gaps_are_pooled():
    found = summarize(EVERYONE, percentiles=(50, 90, 99))
    ttft = np.array([500, 1000, 250])
    assert found["mean_ttft_ms"] == pytest.approx(ttft.mean())
    assert found["std_ttft_ms"] == pytest.approx(ttft.std())
    assert found["median_ttft_ms"] == found["p50_ttft_ms"] == pytest.approx(500)
    assert found["p90_ttft_ms"] == pytest.approx(500 + 0.8 * 500)
    # One of a single token has no TPOT: it is in no percentile of it.
    assert found["mean_tpot_ms"] == pytest.approx((200 + 300) / 2)
    gaps = [200, 100, 300, 0, 0, 600, 0, 900]
    assert found["mean_itl_ms"] == pytest.approx(np.mean(gaps))
    assert found["p99_itl_ms"] == pytest.approx(np.percentile(gaps, 99))
    assert found["mean_e2el_ms"] == pytest.approx((1100 + 2500 + 250) / 3)


def test_several_tokens_a_chunk_are_one_gap_between_chunks():
    found = summarize([A, B], percentiles=(90,))
    apart = [200, 100, 300, 600, 900]  # as vLLM's benchmark counts gaps
    assert found["mean_icl_ms"] == pytest.approx(np.mean(apart))
    assert found["p90_icl_ms"] == pytest.approx(np.percentile(apart, 90))
    # Tokens that came one by one have the same gaps by both names.
    alone = summarize([A])
    assert alone["mean_icl_ms"] == alone["mean_itl_ms"]


def test_throughput_is_of_completed_requests_over_their_time():
    found = summarize(EVERYONE)
    assert found["duration"] == pytest.approx(4.5 - 1.0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (27, 11)
    assert found["request_throughput"] == pytest.approx(3 / 3.5)
    assert found["output_throughput"] == pytest.approx(11 / 3.5)
    assert found["total_token_throughput"] == pytest.approx(38 / 3.5)
    # Seconds from 1.0 on: tokens 1.5 1.7 1.8; 2.1; 3.0 3.0 3.0 3.6 3.6; 4.5 4.25.
    assert found["max_output_tokens_per_s"] == 5
    assert found["max_concurrent_requests"] == 2  # a and b; b and c


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (SLO(), 3),
        (SLO(ttft=0.5), 2),
        (SLO(ttft=0.5, tpot=0.25), 2),  # c, of one token, meets any bound on TPOT
        (SLO(tpot=0.25), 2),
        (SLO(itl=0.31), 2),
        (SLO(e2el=0.3), 1),
        (SLO(ttft=0.1), 0),
    ],
)
def test_attainment_counts_what_failed_and_what_was_shed(slo: SLO, good: int):
    found = summarize(EVERYONE, slo)
    counts = [found[key] for key in ("completed", "failed", "shed", "aborted")]
    assert counts == [3, 1, 1, 1]
    # One that its client has aborted is nobody's failure.
    assert (found["slo_good"], found["slo_total"]) == (good, 5)
    assert found["slo_attainment"] == pytest.approx(good / 5)
    assert found["request_goodput"] == pytest.approx(good / 3.5)


def test_requests_with_slos_of_their_own_are_held_against_those():
    # Of FAILED, ABORTED, SHED, A, B, C: B is good by its own bound, C has none and does not count.
    own = [SLO(ttft=1.0), SLO(ttft=1.0), None, SLO(ttft=0.4), SLO(ttft=1.0), None]
    found = summarize(EVERYONE, own)
    assert (found["slo_good"], found["slo_total"]) == (1, 3)
    assert found["request_goodput"] == pytest.approx(1 / 3.5)
    assert summarize(EVERYONE, [None] * 6)["slo_good"] is None


def test_bounds_that_a_request_has_take_the_place_of_the_usual_ones():
    usual = SLO(ttft=0.3, tpot=0.01)
    assert SLO(ttft=2.0).over(usual) == SLO(ttft=2.0, tpot=0.01)
    assert SLO(ttft=2.0).over(None) == SLO(ttft=2.0)


def test_without_slos_there_is_neither_goodput_nor_attainment():
    found = summarize(EVERYONE)
    keys = ("slo_good", "slo_total", "slo_attainment", "request_goodput")
    assert [found[key] for key in keys] == [None] * 4


def test_nothing_but_failures_has_no_latency():
    found = summarize([FAILED, SHED], SLO(ttft=1.0))
    assert (found["slo_good"], found["slo_total"], found["slo_attainment"]) == (0, 2, 0)
    assert found["mean_ttft_ms"] is None and found["max_output_tokens_per_s"] == 0
    assert found["request_goodput"] is None  # no time has passed
