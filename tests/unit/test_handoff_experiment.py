"""The hand-off experiment, on two virtual devices and a tiny model."""

import json

import pytest

from experiments import handoff, handoff_house
from experiments.handoff_house import Watch, Way
from experiments.handoff_picture import draw
from pdjax.engine_api import End, Shipment, Side, TransferCost


def test_it_measures_every_way(tmp_path, monkeypatch):
    out, picture = tmp_path / "handoff.json", tmp_path / "handoff.png"
    arguments = ["--model=tiny", "--prompt=24", "--groups=0", "--groups=2", "--budget=16"]
    arguments += ["--page_size=8", "--rounds=1", "--peak_bytes=100000", f"--out={out}"]
    monkeypatch.setattr(handoff_house, "OUTPUT", 4)
    handoff.FLAGS.unparse_flags()
    handoff.FLAGS(["handoff", *arguments])
    handoff.main()
    whole = json.loads(out.read_text())
    bulk, streamed = whole["points"]
    assert (bulk["served"]["shipments"], streamed["served"]["shipments"]) == (1, 4)
    assert bulk["served"]["hidden"] == 0 < streamed["served"]["hidden"]
    assert bulk["alone"]["nbytes"] >= bulk["served"]["nbytes"] > 0
    assert whole["peak_bytes_per_s"]["1x1x1"] > 0
    pytest.importorskip("matplotlib")
    draw(whole, picture)
    assert picture.stat().st_size > 0


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


class Instant:
    """A transfer whose shipments take a second to be read and another to arrive."""

    def __init__(self) -> None:
        self.moment = 0.0

    def now(self) -> float:
        self.moment += 1.0
        return self.moment

    def send(self, shipment: Shipment) -> "Instant":
        return self

    read = pieces = ()
    cost = TransferCost(bytes=6, pages=1, pieces=1, puts=1, layout_changing_puts=0)


@pytest.mark.parametrize(
    ("rate", "ended", "seen"),
    [
        (6.0, 5.5, (2.0, 0.5, 0.5)),  # from 2 to 3 and from 5 to 6
        (4.0, 5.5, (3.0, 0.5, 0.5)),  # reading was seen half a second late
        (1.0, 2.0, (4.0, 3.0, 4.0)),  # nothing is on the wire before it is sent
        (6.0, 7.0, (2.0, 0.0, 0.0)),
    ],
)
def test_time_on_the_wire(rate: float, ended: float, seen: tuple[float, ...]):
    transfer = Instant()
    watch = Watch(transfer, transfer.now)  # type: ignore[arg-type]
    end = End(Side.PREFILL, 0)
    for _ in range(2):
        transfer.send(Shipment(end, end, range(1), [1], 1))
        watch._seen[-1].result()
    assert watch.take(ended, rate) == seen
    assert watch.take(0.0, rate) == (0.0, 0.0, 0.0)
