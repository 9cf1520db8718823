"""The hand-off experiment, on two virtual devices and a tiny model."""

import json
from concurrent.futures import Future

import pytest

from experiments.handoff import __main__ as handoff
from experiments.handoff import pair, trace
from experiments.handoff.pair import Watch, Way, _Seen
from experiments.handoff.picture import draw
from experiments.handoff.trace import Traced
from pdjax.core.ids import PoolId
from pdjax.interfaces.transport import TransferCost, TransferJob


def test_it_measures_every_way(tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "handoff.json", tmp_path / "handoff.png"
    arguments = ["--model=tiny", "--layers=2", "--prompt=24", "--groups=0"]
    arguments += ["--groups=2", "--budget=16", "--page_size=8"]
    arguments += ["--rounds=1", "--peak_bytes=100000", "--trace", f"--out={out}"]
    monkeypatch.setattr(pair, "OUTPUT", 4)
    monkeypatch.setattr(trace, "REST", 0.0)
    handoff.FLAGS.unparse_flags()
    handoff.FLAGS(["handoff", *arguments])
    handoff.main()
    whole = json.loads(out.read_text())
    bulk = whole["points"][0]
    shipments = [each["served"]["shipments"] for each in whole["points"]]
    assert shipments == [1, 4]  # a prefill of two steps
    assert bulk["served"]["hidden"] == 0
    # The profiler sees no copies between virtual devices.
    assert [each["traced"] for each in whole["points"]] == [None] * 2
    traced = capsys.readouterr().out.split("\ntraced")[1].splitlines()[2:4]
    assert [line.split()[-7:] for line in traced] == [["-"] * 7] * 2
    assert bulk["alone"]["nbytes"] >= bulk["served"]["nbytes"] > 0
    assert whole["peak_bytes_per_s"]["1x1x1"] > 0
    pytest.importorskip("matplotlib")
    draw(whole, picture)
    assert picture.stat().st_size > 0


def test_a_table_of_what_was_traced():
    seen = Traced(
        put_bytes=800, put_ms=4, nbytes=400, copy_ms=2.5, gather_ms=0.5, wait_ms=1, behind_ms=3.25
    )
    point = {"traced": handoff._values(seen, "of_put", "of_put_in_all")}
    [*_, line] = handoff._show_traced(["one way", "another"], [{"traced": None}, point]).split("\n")
    assert line.split() == ["another", "4.000", "2.500", "0.500", "1.000", "3.250", "80%", "50%"]


@pytest.mark.parametrize("layout", ["2x2", "0x1x1", "axbxc"])
def test_a_layout_that_is_none_says_what_is_allowed(layout):
    with pytest.raises(ValueError, match=f"layout='{layout}': must be TPxSTAGESxTP"):
        handoff.make_config("tiny", None, layout, [8])


def test_ways_become_configs():
    bulk, rounded = (
        way.handoff for way in (Way("1x1x1", 0, "exact", False), Way("1x1x1", 4, "int8", True))
    )
    assert (bulk.streaming, bulk.wire_dtype) == (False, None)
    assert (rounded.streaming, rounded.layer_groups, rounded.wire_dtype) == (True, 4, "int8")


@pytest.mark.parametrize("groups", [-1, 4])
def test_groups_that_cannot_be_are_refused_first(groups):
    handoff.FLAGS.unparse_flags()
    handoff.FLAGS(["handoff", "--model=tiny", f"--groups={groups}"])
    with pytest.raises(ValueError, match=f"groups={groups}: must be 0, in bulk, or at most one"):
        handoff.asked_ways(3)


class Ticking:
    """A transport whose jobs are sent, read and seen to have arrived in turn, one a second."""

    def __init__(self) -> None:
        self.moment = 0.0

    def now(self) -> float:
        self.moment += 1.0
        return self.moment

    def send(self, job: TransferJob) -> "Ticking":
        return self

    def result(self) -> TransferCost:
        return TransferCost(bytes=6, pages=1, pieces=1, puts=1, layout_changing_puts=0)

    @property
    def read(self) -> "Ticking":
        return self


@pytest.mark.parametrize(
    ("rate", "ended", "seen"),
    [
        (6.0, 5.5, (2.0, 0.5, 0.5)),  # from 2 to 3 and from 5 to 6
        (4.0, 5.5, (3.0, 0.5, 0.5)),  # the read was seen half a second late
        (1.0, 2.0, (4.0, 3.0, 4.0)),  # nothing is on the wire before it is sent
        (6.0, 7.0, (2.0, 0.0, 0.0)),
    ],
)
def test_time_on_the_wire(rate: float, ended: float, seen: tuple[float, ...]):
    transport = Ticking()
    watch = Watch(transport, transport.now)  # type: ignore[arg-type]
    pool = PoolId("hbm/0")
    for _ in range(2):
        transport.send(TransferJob(1, pool, pool, range(1), [1], 1))
        watch._seen[-1].result()
    assert watch.take(ended, rate) == seen
    assert watch.take(0.0, rate) == (0.0, 0.0, 0.0)


def test_time_on_the_wire_is_counted_once():
    transport = Ticking()
    watch = Watch(transport, transport.now)  # type: ignore[arg-type]
    for moments in ((0.0, 1.0, 4.0), (0.5, 3.0, 6.0), (5.0, 5.0, 5.5)):
        seen = Future[_Seen]()
        seen.set_result(_Seen(*moments, nbytes=0))
        watch._seen.append(seen)
    assert watch.take(ended=5.0, rate=1.0) == (5.0, 1.0, 1.0)  # from 1 to 6
