"""What is told of the newest requests, of hand-made runs."""

import json

from pdjax.core.ids import EngineId, PoolId
from pdjax.host.metrics.recent import SHIPMENTS_EACH, recent
from pdjax.host.metrics.work import Passenger, Shipment
from tests.host.test_metrics import Script, a_life, a_sequence


def a_shipment(number: int, sent: float, layers: range, *names: str) -> Shipment:
    engines = EngineId("prefill/0"), 1, EngineId("decode/0")
    return Shipment(
        id=number,
        source=PoolId("hbm/prefill/0"),
        target=PoolId("hbm/decode/0"),
        layers=layers,
        bytes=512,
        pages=2,
        sent=sent,
        on_wire=sent + 0.25,
        arrived=sent + 0.5,
        written=sent + 0.75,
        passengers=tuple(Passenger(name, *engines) for name in names),
    )


def test_a_life_is_told_in_milliseconds_after_its_arrival():
    script, seq = Script(), a_sequence()
    a_life(script, seq)
    for number, layers in enumerate((range(4), range(4, 8))):
        script.recorder.shipment(a_shipment(number, 5.0 + number, layers, "other", seq.id))
    script.clock.advance(1.0)
    [told] = recent(script.recorder)
    assert json.loads(json.dumps(told)) == told
    assert (told["id"], told["finish_reason"], told["age_ms"]) == (seq.id, "stop", 13_000)
    assert (told["input_len"], told["output_len"], told["preemptions"]) == (5, 4, 0)
    assert (told["ttft_ms"], told["tpot_ms"]) == (4000, 2666.667)
    assert [tuple(phase.values()) for phase in told["phases"]] == [
        ("queue", 0, 3000),
        ("prefill", 3000, 4000),
        ("wait for row", 4000, 5000),
        ("transfer", 5000, 7000),
        ("wait for tick", 7000, 7500),
        ("decode", 7500, 12000),
    ]
    first, second = told["shipments"]
    assert (first["layers"], second["layers"]) == ([0, 3], [4, 7])
    assert (first["engine"], first["target"], first["bytes"]) == ("prefill/0", "decode/0", 512)
    moments = [first[f"{name}_ms"] for name in ("sent", "on_wire", "arrived", "written")]
    assert moments == [5000, 5250, 5500, 5750]


def test_the_last_phase_of_a_sequence_that_runs_ends_now():
    script, seq = Script(), a_sequence(arrival=1.0)
    script.at(1.0, seq, "arrived")
    script.at(2.0, seq, "prefill_started")
    script.clock.advance(0.5)
    [told] = recent(script.recorder)
    assert (told["finish_reason"], told["ttft_ms"], told["output_len"]) == (None, None, 0)
    assert [tuple(phase.values()) for phase in told["phases"]] == [
        ("queue", 0, 1000),
        ("prefill", 1000, 1500),
    ]


def test_only_the_newest_that_have_ended_and_the_oldest_that_run_are_told():
    script = Script()
    for number in range(6):
        script.at(number, a_sequence(f"ended {number}", number), "arrived", "finished")
    for number in range(6, 12):
        script.at(number, a_sequence(f"runs {number}", number), "arrived")
    told = [each["id"] for each in recent(script.recorder, most=2)]
    assert told == ["ended 4#0", "ended 5#0", "runs 6#0", "runs 7#0"]


def test_shipments_of_long_ago_are_not_looked_through():
    script, seq = Script(keep=10), a_sequence()
    script.at(0.0, seq, "arrived")
    for number in range(SHIPMENTS_EACH + 9):
        script.recorder.shipment(a_shipment(number, number, range(1), seq.id))
    [told] = recent(script.recorder)
    assert [each["sent_ms"] for each in told["shipments"]] == [
        1000 * number for number in range(9, SHIPMENTS_EACH + 9)
    ]
    assert recent(Script().recorder) == []
