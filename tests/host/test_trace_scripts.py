"""Traces of runs made by hand: what a simulation does not do."""

import json
from itertools import count
from pathlib import Path

import pytest

from pdjax.core.clock import VirtualClock
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.request import Request, SamplingParams
from pdjax.host.metrics.recorder import SPANS_EACH, Recorder
from pdjax.host.metrics.timeline import Timeline
from pdjax.host.metrics.work import Passenger, Shipment
from pdjax.host.sequences.sequence import Sequence
from tests.helpers.deployment import deploy
from tests.helpers.traced import FLOWS_BY_KIND, one, traced


class Script:
    """A recorder with a clock that is set, and what a prefill engine and a decode engine did."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.recorder = Recorder(self.clock)

    def mark(self, sequence: Sequence, name: str, moment: float) -> None:
        self.clock.advance(moment - self.clock.now())
        self.recorder.mark(sequence, name)


def a_sequence(name: str = "a") -> Sequence:
    return Sequence(Request(name, (1, 2, 3), SamplingParams(), 0.0), choice=0, seed=0)


def a_shipment(sent: float, id: int = 1, engine: str | None = "prefill/0") -> Shipment:
    return Shipment(
        id=id,
        source=PoolId("hbm/p"),
        target=PoolId("hbm/d"),
        layers=range(16),
        bytes=4096,
        pages=2,
        sent=sent,
        on_wire=sent + 1,
        arrived=sent + 2,
        written=sent + 2.5,
        passengers=(
            Passenger("a#0", None if engine is None else EngineId(engine), 1, EngineId("decode/0")),
        ),
    )


def a_handoff(script: Script) -> Sequence:
    sequence, recorder = a_sequence(), script.recorder
    recorder.span("prefill/0", "step", 1.0, 3.0, who="a#0", number=1, tokens=3)
    recorder.shipment(a_shipment(1.5))
    script.mark(sequence, "arrived", 0.0)
    script.mark(sequence, "first_tick", 4.5)
    recorder.span("decode/0", "tick", 3.9, 4.9, who="b#0", rows_active=1)
    recorder.span("decode/0", "tick", 4.5, 5.5, who="a#0, b#0", rows_active=2)
    return sequence


def test_a_tick_that_was_dispatched_ahead_is_shown_after_its_predecessor(tmp_path: Path):
    script = Script()
    a_handoff(script)
    tables = traced(script.recorder, tmp_path)
    ticks = tables.execute("select ts / 1e6, dur / 1e6 from slice where name = 'tick'").fetchall()
    assert ticks == [(3900, 1000), (4900, 600)]
    assert one(tables, FLOWS_BY_KIND, "wire", "tick") == 1
    into = "select ts / 1e6 from slice join flow on slice_in = id where name = 'tick'"
    assert one(tables, into) == 4900


@pytest.mark.parametrize(("tick", "part"), [(3.2, "wire"), (2.6, "wire"), (2.3, "gather")])
def test_a_tick_that_runs_ahead_of_the_arrival_has_its_arrow(
    tmp_path: Path, tick: float, part: str
):
    """It is dispatched once the KV is sent, before the host sees it on the wire (2.5) or arrive."""
    script, sequence = Script(), a_sequence()
    script.recorder.span("prefill/0", "step", 1.0, 2.2, who="a#0", number=1, tokens=3)
    script.recorder.shipment(a_shipment(1.5))
    script.mark(sequence, "arrived", 0.0)
    script.mark(sequence, "first_tick", tick)
    script.recorder.span("decode/0", "tick", tick, 5.0, who="a#0", rows_active=1)
    tables = traced(script.recorder, tmp_path)
    assert tables.execute("select * from stats").fetchall() == []
    assert one(tables, FLOWS_BY_KIND, part, "tick") == 1
    assert one(tables, FLOWS_BY_KIND, "prefill 1", part) == 1
    assert one(tables, "select count(*) from flow") == 2


def test_shipments_of_one_link_that_overlap_lie_side_by_side(tmp_path: Path):
    script = Script()
    for id, sent in enumerate((1.0, 2.0, 3.5), start=1):
        script.recorder.shipment(a_shipment(sent, id))
    tables = traced(script.recorder, tmp_path)
    assert tables.execute("select * from stats").fetchall() == []
    names = "select name from thread order by utid"
    assert tables.execute(names).fetchall() == [("hbm/p->hbm/d",), ("hbm/p->hbm/d (2)",)]


def test_a_migration_has_an_arrow_from_the_wire_alone(tmp_path: Path):
    script, sequence = Script(), a_sequence()
    script.recorder.shipment(a_shipment(1.0, engine=None))
    script.mark(sequence, "arrived", 0.0)
    script.mark(sequence, "first_tick", 4.0)
    script.recorder.span("decode/0", "tick", 4.0, 5.0, who="a#0")
    tables = traced(script.recorder, tmp_path)
    assert (
        one(tables, "select count(*) from flow") == one(tables, FLOWS_BY_KIND, "wire", "tick") == 1
    )


def test_kv_that_nobody_decoded_with_has_no_arrow_to_a_tick(tmp_path: Path):
    script, sequence = Script(), a_sequence()
    script.recorder.span("prefill/0", "step", 1.0, 3.0, who="a#0", number=1)
    script.recorder.shipment(a_shipment(1.5)._replace(written=None))
    script.mark(sequence, "arrived", 0.0)
    script.mark(sequence, "preempted", 4.0)
    script.mark(sequence, "first_tick", 9.0)  # with what was computed again
    script.recorder.span("decode/0", "tick", 9.0, 9.5, who="a#0")
    tables = traced(script.recorder, tmp_path)
    assert one(tables, FLOWS_BY_KIND, "prefill 1", "wire") == 1
    assert one(tables, "select count(*) from flow") == 1
    [args] = tables.execute("select args from slice where name like 'layers%'").fetchone()
    assert json.loads(args)["dropped"] is True
    assert one(tables, "select count(*) from slice where name = 'scatter'") == 0


def test_steps_that_are_numbered_alike_after_a_broken_turn_are_told_apart():
    script = Script()
    for start in (1.0, 5.0):
        script.recorder.span("prefill/0", "step", start, start + 2, who="a#0", number=1)
    script.recorder.shipment(a_shipment(1.5, 1))
    script.recorder.shipment(a_shipment(5.5, 2))
    first, second = Timeline.of(script.recorder).flows
    assert first.step is not None and second.step is not None
    assert (first.step.start, second.step.start) == (1.0, 5.0)


def test_an_engine_of_which_no_step_is_kept_is_left_out(tmp_path: Path):
    recorder = Recorder(VirtualClock(), keep=1)
    recorder.span("decode/0", "tick", 0.0, 1.0, rows_active=1)
    for n in range(SPANS_EACH):
        recorder.span("decode/1", "tick", 1.0 + n, 2.0 + n, rows_active=1)
    assert list(Timeline.of(recorder).steps) == ["decode/1"]
    tables = traced(recorder, tmp_path)
    assert one(tables, "select count(*) from slice where name = 'tick'") == SPANS_EACH


def test_kv_that_has_come_to_an_engine_without_a_tick_is_shown():
    script = Script()
    script.recorder.span("decode/0", "step", 1.0, 3.0, who="b#0", number=1)  # it prefills, too
    script.recorder.shipment(a_shipment(1.5))
    [flow] = Timeline.of(script.recorder).flows
    assert flow.tick is None


def test_a_step_begins_before_what_leaves_with_it_is_sent(monkeypatch: pytest.MonkeyPatch):
    """Else no arrow would lead from it to the wire."""
    moments = count()
    monkeypatch.setattr(VirtualClock, "now", lambda self: next(moments) * 1e-3)
    deployment = deploy(groups=2)
    deployment.submit("a", prompt_len=20)
    deployment.run()
    begun = {span.number: span.start for span in deployment.recorder.spans() if span.number}
    shipments = deployment.recorder.shipments()
    assert shipments
    for shipment in shipments:
        [passenger] = shipment.passengers
        assert begun[passenger.step] <= shipment.sent
