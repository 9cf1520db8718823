"""Metrics of hand-made runs, whose numbers can be checked by eye."""

import json
from array import array
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdjax.core.clock import VirtualClock
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.request import Request, SamplingParams
from pdjax.core.slo import SLO
from pdjax.host.handoff.accounting import TransferTotals
from pdjax.host.metrics import definitions
from pdjax.host.metrics.metric import Metric
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.request import FirstGap, phases
from pdjax.host.metrics.summary import report, summarize
from pdjax.host.sequences.sequence import Sequence

COST = TransferTotals(transfers=1, bytes=4096, pages=2, pieces=6, puts=1, seconds=2.0)


def a_sequence(name: str = "a", arrival: float = 0.0, prompt_tokens: int = 5) -> Sequence:
    request = Request(name, tuple(range(prompt_tokens)), SamplingParams(), arrival)
    return Sequence(request, choice=0, seed=0)


class Script:
    """Plays moments into a Recorder: `at(2.0, seq, "token")`."""

    def __init__(self, keep: int = 100) -> None:
        self.clock = VirtualClock()
        self.recorder = Recorder(self.clock, keep)

    def at(self, moment: float, seq: Sequence, *names: str) -> None:
        self.clock.advance(moment - self.clock.now())
        for name in names:
            if name == "token":
                self.recorder.token(seq, moment)
            elif name == "finished":
                seq.finish_reason = seq.finish_reason or "stop"
                self.recorder.mark(seq, name)
            else:
                self.recorder.mark(seq, name)


def a_life(script: Script, seq: Sequence, start: float = 1.0) -> None:
    """Queue 2 s, prefill 1 s, wait 1 s, transfer 2 s, wait half a second for the tick; later tokens
    8, 9 and 11 s after `start`."""
    script.at(start, seq, "arrived")
    script.at(start + 2, seq, "prefill_started")
    script.at(start + 3, seq, "first_token", "token", "prefilled")
    script.at(start + 4, seq, "reserved", "transfer_started", "sent")
    script.at(start + 6, seq, "transfer_landed", "decoding")
    script.recorder.transfer(seq, COST)
    script.at(start + 6.5, seq, "first_tick")
    script.at(start + 8, seq, "token")
    script.at(start + 9, seq, "token")
    script.at(start + 11, seq, "token", "finished")


def test_latencies_of_one_request():
    script, seq = Script(), a_sequence(arrival=1.0)
    a_life(script, seq)
    (metrics,) = script.recorder.requests()
    assert metrics == script.recorder.request(seq)
    assert metrics.queue == 2
    assert metrics.ttft == 3
    assert metrics.itl == (5, 1, 2)
    assert metrics.tpot == pytest.approx(8 / 3)
    assert metrics.e2e == 11
    assert (metrics.prompt_tokens, metrics.output_tokens, metrics.preemptions) == (5, 4, 0)
    assert (metrics.transfer.bytes, metrics.transfer.pages, metrics.transfer.seconds) == (
        4096,
        2,
        2,
    )
    assert metrics.to_json()["ttft_ms"] == 3000


def test_named_waits_add_up_to_the_first_token_and_to_the_first_gap():
    script, seq = Script(), a_sequence(arrival=1.0)
    a_life(script, seq)
    whole = script.recorder.request(seq).to_json()
    assert (whole["queue_ms"], whole["prefill_ms"]) == (2000, 1000)
    assert whole["queue_ms"] + whole["prefill_ms"] == whole["ttft_ms"]
    parts = [whole[f"{part}_ms"] for part in ("row_wait", "kv_wait", "tick_wait", "first_tick")]
    assert parts == [1000, 2000, 500, 1500]
    assert sum(parts) == whole["itls_ms"][0]
    assert [whole[f"{mark}_ms"] for mark in ("reserved", "sent", "written")] == [4000, 4000, 6000]


def test_a_preemption_in_the_first_gap_counts_as_the_rest_of_it():
    script, seq = Script(), a_sequence()
    script.at(0, seq, "arrived", "prefill_started")
    script.at(1, seq, "first_token", "token", "prefilled")
    script.at(3, seq, "preempted")
    script.at(4, seq, "prefill_started")
    script.at(6, seq, "token", "prefilled", "finished")
    assert script.recorder.request(seq).first_gap == FirstGap(2, 0, 0, 3)


def test_a_single_token_has_no_tpot():
    script, seq = Script(), a_sequence()
    script.at(0, seq, "arrived")
    script.at(1, seq, "prefill_started")
    script.at(2, seq, "token", "finished")
    (metrics,) = script.recorder.requests()
    assert metrics.tpot is None
    assert metrics.itl == ()
    assert summarize([metrics])["mean_tpot_ms"] is None
    assert SLO(ttft=2, tpot=1e-6, itl=1e-6).met_by(metrics)


def test_time_to_first_token_counts_from_arrival_not_from_when_it_was_noticed():
    script, seq = Script(), a_sequence(arrival=1.0)
    script.at(4, seq, "arrived", "prefill_started")
    script.at(5, seq, "token")
    assert script.recorder.request(seq).ttft == 4


def test_summary_has_the_keys_and_numbers_of_the_field():
    script = Script()
    a_life(script, a_sequence("a", arrival=1.0), start=1.0)
    a_life(script, a_sequence("b", arrival=13.0, prompt_tokens=7), start=13.0)
    summary = summarize(script.recorder.requests(), SLO(ttft=3, e2el=11))
    assert summary["duration"] == 23
    assert (summary["completed"], summary["failed"], summary["aborted"]) == (2, 0, 0)
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (12, 8)
    assert summary["request_throughput"] == pytest.approx(2 / 23)
    assert summary["request_goodput"] == pytest.approx(2 / 23)
    assert summary["slo_attainment"] == 1
    assert summary["output_throughput"] == pytest.approx(8 / 23)
    assert summary["total_token_throughput"] == pytest.approx(20 / 23)
    assert summary["max_concurrent_requests"] == 1
    assert summary["mean_ttft_ms"] == summary["p99_ttft_ms"] == 3000
    assert summary["std_ttft_ms"] == 0
    assert summary["median_itl_ms"] == 2000
    assert summary["p90_itl_ms"] == 5000
    assert summary["median_e2el_ms"] == 11000


def test_percentiles_interpolate_linearly():
    script = Script()
    for number in range(3):
        seq = a_sequence(str(number), arrival=10.0 * number)
        script.at(10 * number, seq, "arrived", "prefill_started")
        script.at(10 * number + 1 + number, seq, "token", "finished")
    summary = summarize(script.recorder.requests(), percentiles=(25,))
    assert summary["p25_ttft_ms"] == 1500
    assert summary["median_ttft_ms"] == 2000


def test_failed_and_aborted_requests_count_apart():
    script = Script()
    for name, reason in (("a", "length"), ("b", "error"), ("c", "abort")):
        seq = a_sequence(name)
        script.at(script.clock.now(), seq, "arrived", "prefill_started")
        seq.finish_reason = reason
        script.at(script.clock.now() + 1, seq, "token", "finished")
    summary = summarize(script.recorder.requests(), SLO(ttft=5))
    assert (summary["completed"], summary["failed"], summary["aborted"]) == (1, 1, 1)
    assert summary["total_output_tokens"] == 1
    assert summary["slo_attainment"] == 0.5


def test_a_run_of_nothing_has_a_summary():
    summary = summarize([])
    assert summary["completed"] == 0
    assert summary["request_throughput"] is summary["mean_ttft_ms"] is None


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_slo_refuses_what_nobody_can_meet(limit: float):
    with pytest.raises(ValueError, match=r"slo.tpot=.*must be None or a positive number"):
        SLO(tpot=limit)


def test_goodput_needs_every_objective():
    script, seq = Script(), a_sequence(arrival=1.0)
    a_life(script, seq)
    metrics = script.recorder.request(seq)
    assert SLO(ttft=3, tpot=2.667).met_by(metrics)
    assert not SLO(ttft=3, tpot=2.666).met_by(metrics)
    assert not SLO(ttft=2.999, tpot=2.667).met_by(metrics)


def test_unknown_mark_is_refused():
    with pytest.raises(ValueError, match=r"mark='begun': allowed are arrived"):
        Script().recorder.mark(a_sequence(), "begun")


def test_occupancy_and_bubbles():
    recorder = Script().recorder
    for rows, stages in ((10, 5), (4, 2), (1, 1)):
        recorder.span(
            "decode/0", "tick", 0, 1, rows_active=rows, rows=10, stages_active=stages, stages=5
        )
    recorder.span("prefill/0", "step", 0, 1, tokens=12)
    assert recorder.engines["decode/0"].occupancy == pytest.approx(15 / 30)
    assert recorder.engines["decode/0"].bubble_share == pytest.approx(1 - 8 / 15)
    assert recorder.engines["prefill/0"].occupancy is None
    assert recorder.engines["prefill/0"].bubble_share is None
    assert recorder.engines["prefill/0"].sums == {"tokens": 12}


def test_overlapping_steps_are_busy_once():
    recorder = Script().recorder
    recorder.span("decode/0", "tick", 0, 4)
    recorder.span("decode/0", "tick", 3, 6)
    recorder.span("decode/0", "tick", 8, 9)
    assert recorder.engines["decode/0"].steps == 3
    assert recorder.engines["decode/0"].busy_seconds == 7


def test_transfers_add_up():
    recorder = Script().recorder
    one, two = a_sequence("a"), a_sequence("b")
    recorder.transfer(one, replace(COST, seconds=0.5))
    recorder.transfer(one, replace(COST, seconds=0.25))
    recorder.transfer(
        two, TransferTotals(1, bytes=100, pages=1, layout_changing_puts=1, seconds=0.25)
    )
    totals = recorder.transfers
    assert (totals.transfers, totals.seconds) == (3, 1.0)
    assert totals.bytes == 0, "shipments are counted by themselves"
    assert recorder.request(one).transfer.bytes == 8192


def test_only_the_newest_are_kept_but_totals_are_whole():
    script = Script(keep=2)
    for number in range(5):
        seq = a_sequence(str(number), arrival=float(number))
        script.at(number, seq, "arrived", "finished")
    for number in range(50):
        script.recorder.span("prefill/0", "step", number, number + 1)
    assert [metrics.id for metrics in script.recorder.requests()] == ["3#0", "4#0"]
    assert [span.start for span in script.recorder.spans()] == list(range(30, 50))
    assert script.recorder.engines["prefill/0"].steps == 50
    script.recorder.clear()
    assert script.recorder.requests() == []
    assert script.recorder.spans() == []
    assert script.recorder.engines == {}


def test_long_answers_leave_room_for_fewer():
    """A moment of a token takes 8 bytes, and there is a bound of them."""
    script = Script(keep=3)
    for number in range(4):
        seq = a_sequence(str(number), arrival=float(number))
        for _ in range(1400):
            script.recorder.token(seq, 1.0)
        script.at(number, seq, "arrived", "finished")
    kept = script.recorder.requests()
    assert [metrics.id for metrics in kept] == ["2#0", "3#0"]
    assert all(isinstance(metrics.token_times, array) for metrics in kept)


def test_to_ask_for_somebody_unknown_keeps_nothing():
    script = Script()
    assert script.recorder.request(a_sequence()).token_times == array("d")
    assert not script.recorder._live


def test_phases_fill_the_life_of_a_request():
    script, seq = Script(), a_sequence(arrival=1.0)
    a_life(script, seq)
    assert phases(script.recorder.request(seq)) == [
        ("queue", 1, 3),
        ("prefill", 3, 4),
        ("wait for row", 4, 5),
        ("transfer", 5, 7),
        ("wait for tick", 7, 7.5),
        ("decode", 7.5, 12),
    ]


def test_phases_of_a_preempted_request():
    script, seq = Script(), a_sequence()
    script.at(0, seq, "arrived")
    script.at(1, seq, "prefill_started")
    script.at(2, seq, "reserved", "sent")  # ahead, with the first chunk
    script.at(3, seq, "token", "first_token", "prefilled")
    script.at(4, seq, "decoding", "first_tick")  # one pool for both phases: nothing is moved
    script.at(6, seq, "token")
    script.at(7, seq, "preempted")
    script.at(8, seq, "prefill_started")
    script.at(9, seq, "token", "prefilled")
    script.at(10, seq, "transfer_started")
    script.at(11, seq, "transfer_landed", "decoding", "first_tick")
    script.at(12, seq, "token", "finished")
    metrics = script.recorder.request(seq)
    assert metrics.preemptions == 1
    assert phases(metrics) == [
        ("queue", 0, 1),
        ("prefill", 1, 3),
        ("wait for row", 3, 4),
        ("decode", 4, 7),
        ("queue", 7, 8),
        ("prefill", 8, 9),
        ("wait for row", 9, 10),
        ("transfer", 10, 11),
        ("decode", 11, 12),
    ]


def test_phases_of_a_request_that_goes_on_last_until_its_last_token():
    script, seq = Script(), a_sequence()
    script.at(0, seq, "arrived")
    script.at(1, seq, "prefill_started")
    script.at(3, seq, "first_token", "token")
    assert phases(script.recorder.request(seq)) == [("queue", 0, 1), ("prefill", 1, 3)]


def test_report_is_plain_json():
    script = Script()
    a_life(script, a_sequence(arrival=1.0))
    script.recorder.span("prefill/0", "step", 3.0, 4.0, tokens=5)
    whole = json.loads(json.dumps(report(script.recorder, SLO(ttft=0.001))))
    assert whole["request_goodput"] == 0
    assert whole["requests"][0]["itls_ms"] == [5000, 1000, 2000]
    assert whole["engines"]["prefill/0"]["steps"] == 1
    assert whole["transfers"]["layout_changing_puts"] == 0
    assert whole["definitions"]["requests"]["ttft_ms"].endswith("first token - arrival [ms]")


def keys_of(metrics: Iterable[Metric]) -> list[str]:
    keys = [metric.key for metric in metrics]
    assert len(keys) == len(set(keys))
    return sorted(keys)


def test_every_key_of_a_report_is_defined_once_and_every_definition_is_a_key():
    script = Script()
    a_life(script, a_sequence(arrival=1.0))
    script.recorder.span("prefill/0", "step", 3.0, 4.0, tokens=5)
    script.recorder.link(PoolId("hbm/0"), PoolId("hbm/1"))
    script.recorder.went_out(EngineId("prefill/0"))
    whole = report(script.recorder)
    statistics = {key for name in definitions.SAMPLED for key in definitions.statistic_keys(name)}
    assert sorted(set(whole) - statistics) == keys_of(definitions.RUN)
    assert statistics <= set(whole)
    assert sorted(whole["requests"][0]) == keys_of(definitions.REQUEST)
    assert sorted(whole["transfers"]) == keys_of(definitions.TRANSFER)
    assert sorted(whole["requests"][0]["transfer"]) == keys_of(definitions.TRANSFER)
    assert sorted(whole["links"]["hbm/0->hbm/1"]) == keys_of(definitions.LINK)
    assert sorted(whole["engines"]["prefill/0"]) == keys_of(definitions.ENGINE)
    assert sorted(whole["prefills"]) == keys_of(definitions.PREFILLS)
    assert sorted(whole["duties"]["prefill/0"]) == keys_of(definitions.DUTY)
    assert sorted(whole["definitions"]) == sorted(definitions.GROUPS)


def test_the_page_of_metrics_is_up_to_date():
    """Else: python -m pdjax.host.metrics.definitions > docs/metrics.md"""
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert page.read_text("utf-8") == definitions.markdown()


def test_every_metric_has_a_unit_that_its_key_does_not_contradict():
    units = {"_ms": "ms", "_s": "s", "_len": "tokens", "_tokens": "tokens", "bytes": "B"}
    for group, metrics in definitions.GROUPS.items():
        for metric in metrics:
            for ending, unit in units.items():
                if metric.key.endswith(ending) and not metric.key.endswith("per_s"):
                    assert metric.unit == unit, (group, metric)


def test_free_pages_are_kept_when_they_change():
    script = Script()
    for moment, pages in ((1.0, 5), (2.0, 5), (3.0, 4)):
        script.clock.advance(moment - script.clock.now())
        script.recorder.free_pages(PoolId("hbm/0"), pages)
    assert script.recorder.pages() == [("hbm/0", 1.0, 5), ("hbm/0", 3.0, 4)]


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (SLO(), True),
        (SLO(ttft=3.0, tpot=2.7, itl=5.0, e2el=11.0), True),
        (SLO(ttft=2.9), False),
        (SLO(tpot=2.6), False),
        (SLO(itl=4.9), False),
        (SLO(e2el=10.9), False),
    ],
)
def test_a_request_is_good_if_it_meets_every_bound(slo: SLO, good: bool):
    script, seq = Script(), a_sequence(arrival=1.0)
    a_life(script, seq)  # first token after 3 s, gaps of 5, 1 and 2 s
    assert slo.met_by(script.recorder.request(seq)) is good


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_bound_that_is_no_positive_number_is_refused(seconds: Any):
    with pytest.raises(ValueError, match=r"^slo.itl=.*: must be None or a positive number of sec"):
        SLO(itl=seconds)
