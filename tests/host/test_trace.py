"""Traces of simulated runs, asked in SQL as Perfetto's trace processor is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdjax.config import Config, DecodeConfig, HandoffConfig, KVConfig, PrefillConfig
from pdjax.core.clock import VirtualClock
from pdjax.host.metrics import definitions
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.timeline import Timeline
from pdjax.sim.cluster import Cluster
from pdjax.sim.links import Link
from pdjax.workloads.synthetic import poisson, regular
from tests.helpers.deployment import deploy
from tests.helpers.traced import FLOWS_BY_KIND, one, traced
from tests.helpers.workload import Workload

CONFIG = Config(
    prefill=PrefillConfig(engines=2, token_budget=1024),
    decode=DecodeConfig(engines=2, rows=3),
    kv=KVConfig(page_size=64),
    handoff=HandoffConfig(layer_groups=4),
)
SLOW = Link(bandwidth=20e9)
SEED = 7
"""Of a run in which no sequence runs ahead: the arrow of one that does leads to the first tick that
is dispatched once its KV is known to be there, and not to the one before."""


def a_run(config: Config = CONFIG, count: int = 8, **cluster: Any) -> Cluster:
    made = Cluster(config, link=SLOW, **cluster)
    made.expect(poisson(30, count, prompt=(200, 3000), output=(2, 30), seed=SEED))
    made.run()
    return made


def test_every_event_is_taken(tmp_path: Path):
    tables = traced(a_run().recorder, tmp_path)
    assert tables.execute("select * from stats").fetchall() == []
    assert one(tables, "select count(*) from slice where dur < 0") == 0, "none is left open"


def test_every_handoff_is_seen_with_its_arrows(tmp_path: Path):
    """Of each shipment of a sequence one arrow from its prefill step, one to its first tick."""
    cluster = a_run()
    tables = traced(cluster.recorder, tmp_path)
    jobs = len(cluster.recorder.shipments())
    parts = sum(len(each.passengers) for each in cluster.recorder.shipments())
    handoffs = cluster.recorder.transfers.transfers
    assert handoffs == 8 and jobs >= 4 * handoffs / 2
    assert one(tables, "select count(*) from slice where name like 'layers % of %'") == jobs
    assert one(tables, "select count(*) from slice where name = 'wire'") == jobs
    assert one(tables, FLOWS_BY_KIND, "prefill %", "wire") == parts
    assert one(tables, FLOWS_BY_KIND, "wire", "tick") == parts
    assert one(tables, "select count(*) from flow") == 2 * parts
    backwards = """select count(*) from flow join slice a on slice_out = a.id
                   join slice b on slice_in = b.id where a.ts > b.ts"""
    assert one(tables, backwards) == 0


def test_an_arrow_ends_at_the_first_tick_of_its_sequence(tmp_path: Path):
    cluster = a_run()
    timeline = Timeline.of(cluster.recorder)
    first = {m.id: m.since_arrival("first_tick") for m in timeline.requests}
    arrival = {m.id: m.arrival for m in timeline.requests}
    for flow in timeline.flows:
        assert flow.step is not None and flow.tick is not None
        assert flow.sequence in flow.step.span.who.split(", ")
        assert flow.sequence in flow.tick.span.who.split(", ")
        moment = first[flow.sequence]
        assert moment is not None
        assert flow.tick.span.start == pytest.approx(arrival[flow.sequence] + moment)


def test_parts_of_a_shipment_fill_it(tmp_path: Path):
    tables = traced(a_run().recorder, tmp_path)
    parts = tables.execute(
        """select whole.dur, sum(part.dur), min(part.depth) from slice whole
           join slice part on part.parent_id = whole.id
           where whole.name like 'layers %' group by whole.id"""
    ).fetchall()
    assert parts and all(dur == total and depth == 1 for dur, total, depth in parts)


def test_tracks_bear_the_names_of_engines_and_links(tmp_path: Path):
    tables = traced(a_run().recorder, tmp_path)
    names = "select thread.name from thread join process using (upid) where process.name = ?"
    engines = tables.execute(names, ("engines",)).fetchall()
    assert engines == [("decode/0",), ("decode/1",), ("prefill/0",), ("prefill/1",)]
    links = {name for (name,) in tables.execute(names, ("wires (KV between pools)",))}
    ends = [f"hbm/prefill-{i}->hbm/decode-{j}" for i in range(2) for j in range(2)]
    assert {name.split(" (")[0] for name in links} <= set(ends) and links


def test_requests_show_what_they_waited_for(tmp_path: Path):
    cluster = a_run()
    tables = traced(cluster.recorder, tmp_path)
    names = [name for (name,) in tables.execute("select name from process_track order by name")]
    assert names == sorted(f"r{i}#0" for i in range(8))
    [metrics] = [each for each in cluster.recorder.requests() if each.id == "r7#0"]
    spent = dict(
        tables.execute(
            """select slice.name, sum(dur) / 1e6 from slice
               join process_track on track_id = process_track.id
               where process_track.name = 'r7#0' and depth = 1 and dur > 0
               group by slice.name"""
        ).fetchall()
    )
    whole = metrics.to_json()
    assert spent.get("queue", 0.0) == pytest.approx(whole["queue_ms"], abs=1e-3)
    assert spent["prefill"] == pytest.approx(whole["prefill_ms"], abs=1e-3)
    assert spent["transfer"] == pytest.approx(whole["kv_wait_ms"], abs=1e-3)
    tokens = one(
        tables,
        """select count(*) from slice join process_track on track_id = process_track.id
           where process_track.name = 'r7#0' and slice.name like 'token %'""",
    )
    assert tokens == metrics.output_tokens


def test_counters_show_pools_links_and_sequences(tmp_path: Path):
    cluster = a_run()
    tables = traced(cluster.recorder, tmp_path)
    counters = {name for (name,) in tables.execute("select name from counter_track")}
    assert {"waiting sequences", "running sequences"} <= counters
    kinds = ("prefill", "decode")
    assert {f"hbm/{kind}-{i} free pages" for kind in kinds for i in (0, 1)} <= counters
    in_flight = [name for name in counters if name.endswith(" in flight bytes")]
    assert in_flight
    last = """select value from counter join counter_track on track_id = id
              where name = ? order by ts desc, counter.rowid desc limit 1"""
    for name in ("waiting sequences", "running sequences", *in_flight):
        assert one(tables, last, name) == 0
    assert one(tables, "select min(value) from counter") >= 0
    pools = {str(pool.id): pool for pool in cluster.coordinator.loop.fleet.pools.values()}
    for name, pool in pools.items():
        if pool.id.startswith("hbm/decode"):
            least = """select min(value) from counter join counter_track on track_id = id
                       where name = ?"""
            assert one(tables, least, f"{name} free pages") < pool.allocator.total


def test_time_begins_at_0_and_the_clock_is_told(tmp_path: Path):
    cluster = Cluster(CONFIG, link=SLOW)
    cluster.clock.advance(1000.0)
    cluster.expect([replace(each, moment=each.moment + 1000.0) for each in poisson(30, 3)])
    cluster.run()
    tables = traced(cluster.recorder, tmp_path)
    times = "select min(ts) from (select ts from slice union all select ts from counter)"
    assert one(tables, times) == 0
    other = json.loads((tmp_path / "trace.json").read_text())["otherData"]
    assert other == {"clock_at_0_s": Timeline.of(cluster.recorder).start}
    assert other["clock_at_0_s"] > 1000


def test_sums_of_steps_are_whole_numbers_under_defined_keys():
    recorder = a_run().recorder
    keys = {metric.key for metric in definitions.SUMS}
    sums = [work.sums for work in recorder.engines.values()]
    assert set().union(*sums) == keys
    assert all(type(value) is int for each in sums for value in each.values())


def test_counts_of_handoffs_are_whole_and_those_of_requests_add_up():
    cluster = Cluster(CONFIG, link=SLOW)
    cluster.expect(regular(0.0, [(300, 4), (200, 4), (70, 4), (450, 4)]))  # they share shipments
    run = cluster.run()
    totals, each = cluster.recorder.transfers, [metrics.transfer for metrics in run.requests]
    shared = [job for job in cluster.recorder.shipments() if len(job.passengers) > 1]
    assert shared, "or the case shows nothing"
    for name in ("transfers", "shipments", "bytes", "pages", "pieces", "puts"):
        values = [getattr(transfer, name) for transfer in (totals, *each)]
        assert all(type(value) is int for value in values), name
    assert sum(transfer.bytes for transfer in each) == totals.bytes
    assert sum(transfer.pages for transfer in each) == totals.pages
    assert totals.shipments == totals.puts == len(cluster.recorder.shipments())
    assert sum(transfer.shipments for transfer in each) > totals.shipments


def test_waits_account_for_the_first_gap_where_rows_are_scarce():
    """With a single row the second request waits for the first one's last token."""
    config = replace(CONFIG, decode=DecodeConfig(rows=1), prefill=PrefillConfig(engines=1))
    cluster = Cluster(config, link=SLOW)
    cluster.expect(regular(0.0, [(200, 20), (200, 20)]))
    first, second = cluster.run().requests
    for metrics in (first, second):
        whole, gap = metrics.to_json(), metrics.first_gap
        assert gap is not None
        assert whole["queue_ms"] + whole["prefill_ms"] == pytest.approx(whole["ttft_ms"])
        assert sum(part for part in gap if part is not None) == pytest.approx(metrics.itl[0])
    assert second.first_gap is not None and second.first_gap.row_wait is not None
    waited = first.token_times[-1] - second.token_times[0]
    assert second.first_gap.row_wait == pytest.approx(waited, rel=0.1)
    assert second.first_gap.row_wait > 0.9 * second.itl[0] - 0.01


def test_requests_that_run_are_shown_as_far_as_they_are(tmp_path: Path):
    deployment = deploy()
    deployment.submit("a", max_tokens=5)
    sequence = deployment.submit("b", max_tokens=5)
    deployment.run_until(lambda: len(sequence.output) >= 2)
    tables = traced(deployment.recorder, tmp_path)
    names = [name for (name,) in tables.execute("select name from process_track order by name")]
    assert len(deployment.recorder.unfinished()) == 2
    assert tables.execute("select * from stats").fetchall() == []
    assert set(names) <= {"a#0", "b#0"}  # on a clock that stands still a phase takes no time


@pytest.mark.parametrize("seed", range(16))
def test_traces_of_hostile_runs_are_right(seed: int, tmp_path: Path):
    """Where transfers get lost, requests are aborted, turns break and time may stand still."""
    workload = Workload(seed, faults=bool(seed % 2))
    workload.run(check=False)
    recorder = workload.coordinator.loop.lifecycle._recorder
    tables = traced(recorder, tmp_path)
    assert tables.execute("select * from stats").fetchall() == []
    assert (one(tables, "select min(value) from counter") or 0) >= 0
    for flow in Timeline.of(recorder).flows:
        assert flow.step is None or flow.step.span.names(flow.sequence)
        assert flow.tick is None or flow.tick.span.names(flow.sequence)
    for metrics in recorder.requests():
        moments = [moment for _, moment in metrics.marks]
        assert moments == sorted(moments)
        if (gap := metrics.first_gap) is not None:
            parts = [part for part in gap if part is not None]
            assert sum(parts) == pytest.approx(metrics.itl[0]) and min(parts) > -1e-9


def test_a_run_of_nothing_is_a_trace(tmp_path: Path):
    tables = traced(Recorder(VirtualClock()), tmp_path / "deep")
    assert one(tables, "select count(*) from process") == 4
    assert one(tables, "select count(*) from slice") == 0
