"""Random walks over the coordinator: whatever happens, every sequence gets the tokens that it would
have got alone, every page comes back, and nobody waits for ever."""

from collections.abc import Callable

import pytest

from pdjax.engine_api import IDLE_ROW
from pdjax.host.coordinator import Coordinator
from pdjax.host.handoffs import Handoff, Handoffs
from pdjax.host.member import Member
from pdjax.host.pipeline import Pipeline
from pdjax.host.roster import Roster
from pdjax.request import Sequence
from tests.property.workload import REACHED, run_all

SHARDS = 10
SEEDS = 100
"""Workloads a shard."""

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("shard", range(SHARDS))
def test_tokens_pages_and_progress(shard):
    run_all(range(shard * SEEDS, (shard + 1) * SEEDS))


@pytest.mark.parametrize("shard", range(SHARDS))
def test_faults_hurt_nobody_else(shard):
    run_all(range(shard * SEEDS, (shard + 1) * SEEDS), faults=True)


@pytest.mark.smoke
def test_the_workloads_cover_what_may_happen():
    happened = run_all(range(20_000, 20_100)) + run_all(range(20_000, 20_100), faults=True)
    wanted = {"refused", "queue full", "preempted", "faults", "interrupted"}
    wanted |= {"FINISHED", "ABORTED", "FAILED"}
    wanted |= {f"abort in {state.name}" for state in REACHED}
    assert wanted <= happened.keys(), f"never happened: {wanted - happened.keys()}"


# Tests of the test: bugs that were made, or could be, must come out as wrong tokens alone, without
# anybody counting pages.


def source_released_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill pages are given back when the copy begins, not when it has arrived."""
    release, begin = Handoff.release_source, Handoffs.begin

    def begin_and_release(self, *args) -> None:
        before = set(self.in_flight)
        begin(self, *args)
        for handoff in set(self.in_flight) - before:
            release(handoff)

    monkeypatch.setattr(Handoffs, "begin", begin_and_release)
    monkeypatch.setattr(Handoff, "release_source", lambda self: None)


def stale_epoch_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was on its way when the sequence was preempted is taken all the same."""
    monkeypatch.setattr(Member, "current", property(lambda self: not self.sequence.done))


def page_grown_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is added one position after it is needed."""
    needy = Pipeline.needy

    def one_less(self) -> list[Sequence]:
        self._next -= 1
        found = needy(self)
        self._next += 1
        return found

    monkeypatch.setattr(Pipeline, "needy", one_less)


def dropped_row_left_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is given up runs on through the later stages, and writes to its old pages."""
    drop = Pipeline.drop

    def drop_but_fly_on(self, row: int) -> None:
        place = self._place(row)
        kept = self._positions[place], self._tables[place].copy(), self._widths[place]
        drop(self, row)
        if kept[0] != IDLE_ROW:
            self._positions[place], self._tables[place], self._widths[place] = kept

    monkeypatch.setattr(Pipeline, "drop", drop_but_fly_on)


def output_forgotten_by_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A victim starts again behind its prompt, though it has said more."""
    preempt = Roster.preempt

    def preempt_and_forget(self, sequence: Sequence) -> None:
        preempt(self, sequence)
        sequence.prefilled = min(1, sequence.length - 1)

    monkeypatch.setattr(Roster, "preempt", preempt_and_forget)


def penalties_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device does not hear what a penalized sequence has said before it joins."""
    monkeypatch.setattr(Coordinator, "_remember", lambda self, lane: None)


@pytest.mark.parametrize(
    "bug",
    [
        source_released_early,
        stale_epoch_believed,
        page_grown_late,
        dropped_row_left_in_flight,
        output_forgotten_by_recompute,
        penalties_not_remembered,
    ],
)
def test_bugs_are_caught(bug: Patch, monkeypatch: pytest.MonkeyPatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError, match="seed"):
        run_all(range(30_000, 30_300), check=False)
