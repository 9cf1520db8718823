"""An observer sees every turn, step, move and transfer job; `pause` holds decode."""

from collections import Counter
from typing import Any

import pytest

from pdjax.core.ids import EngineId
from pdjax.host.metrics.observer import Observer, TurnPart
from pdjax.host.sequences.sequence import LEGAL_MOVES, Sequence, State
from pdjax.interfaces.steps import StepKind
from tests.helpers.deployment import deploy
from tests.helpers.fakes import expected_output

PREFILL, DECODE = EngineId("prefill/0"), EngineId("decode/0")


class Notes(Observer):
    """Everything that was seen, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def turn_began(self) -> None:
        self.seen.append(("began", None))

    def part_began(self, part: TurnPart) -> None:
        self.seen.append(("part", part))

    def turn_ended(self, busy: bool) -> None:
        self.seen.append(("ended", busy))

    def step_submitted(self, *given: Any) -> None:
        self.seen.append(("submitted", given))

    def step_done(self, *given: Any) -> None:
        self.seen.append(("done", given))

    def sequence_moved(self, sequence: Sequence, before: State, after: State) -> None:
        assert after in LEGAL_MOVES[before] or after is State.WAITING
        assert sequence.state is after
        self.seen.append(("moved", (sequence.id, before, after)))

    def job_sent(self, job: Any) -> None:
        self.seen.append(("sent", job))

    def job_arrived(self, job: Any) -> None:
        self.seen.append(("arrived", job))

    def job_written(self, job: Any) -> None:
        self.seen.append(("written", job))

    def all(self, name: str) -> list[Any]:
        return [what for kind, what in self.seen if kind == name]


def test_a_request_is_seen_on_its_whole_way():
    house, notes = deploy(groups=2), Notes()
    house.coordinator.observer = notes
    sequence = house.submit("a", prompt_len=12)
    house.run()
    states = [after for _, _, after in notes.all("moved")]
    way = [State.PREFILLING, State.PREFILLED, State.TRANSFERRING, State.DECODING, State.FINISHED]
    assert states == way
    assert Counter(notes.all("submitted")) == Counter(done[:-1] for done in notes.all("done"))
    assert all(done[-1] >= done[-2] for done in notes.all("done"))
    prefills = [given for given in notes.all("submitted") if given[1] is StepKind.PREFILL]
    assert [(engine, tokens, rows) for engine, _, tokens, rows, _ in prefills] == [
        (PREFILL, 8, 1),
        (PREFILL, 4, 1),
    ]
    ticks = [given for given in notes.all("submitted") if given[1] is StepKind.DECODE]
    assert [(engine, tokens, rows) for engine, _, tokens, rows, _ in ticks] == [(DECODE, 1, 1)] * 4
    jobs = [job.id for job in notes.all("sent")]
    assert len(jobs) == len(set(jobs)) and jobs
    assert {job.id for job in notes.all("arrived")} == set(jobs)
    assert {job.id for job in notes.all("written")} == set(jobs)
    assert sequence.output == expected_output(sequence, 4)


def test_every_turn_ends_also_one_that_is_broken_off(monkeypatch: pytest.MonkeyPatch):
    house, notes = deploy(), Notes()
    house.coordinator.observer = notes
    house.submit("a")
    with monkeypatch.context() as patch:
        patch.setattr(house.coordinator.loop, "_admit", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            house.coordinator.step()
    house.run()
    turns = [kind for kind, _ in notes.seen if kind in ("began", "ended")]
    assert turns == ["began", "ended"] * (len(turns) // 2)
    assert {*notes.all("part")} >= set(TurnPart) - {TurnPart.WAIT}
    assert {*notes.all("ended")} == {True, False}


def test_preemptions_and_aborts_are_seen_and_a_wait(monkeypatch: pytest.MonkeyPatch):
    house, notes = deploy(), Notes()
    house.coordinator.observer = notes
    a, b = (house.submit(name, max_tokens=20) for name in "ab")
    house.run_until(lambda: {a.state, b.state} == {State.DECODING})
    notes.seen.clear()
    house.coordinator.abort("b")
    with monkeypatch.context() as patch:
        patch.setattr(house.coordinator.loop, "_admit", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            house.coordinator.step()
    assert notes.all("moved") == [
        ("b#0", State.DECODING, State.ABORTED),
        ("a#0", State.DECODING, State.WAITING),
    ]
    house.run()
    assert a.output == expected_output(a, 4)
    notes.seen.clear()
    house.coordinator.step()
    house.coordinator.step()
    assert TurnPart.WAIT in notes.all("part") and notes.seen[-1] == ("ended", False)


def test_nothing_is_observed_any_more_once_another_observer_is_set():
    house, notes = deploy(), Notes()
    house.coordinator.observer = notes
    house.submit("a")
    house.coordinator.step()
    count = len(notes.seen)
    house.coordinator.observer = Observer()
    house.run()
    assert len(notes.seen) == count > 0


def test_a_paused_engine_gathers_sequences_and_ticks_once_it_is_resumed():
    house, notes = deploy(), Notes()
    house.coordinator.observer = notes
    sequences = [house.submit(name) for name in "ab"]
    house.coordinator.pause(DECODE)
    house.coordinator.pause(DECODE)
    house.run_until(lambda: all(each.state is State.DECODING for each in sequences))
    for _ in range(5):
        house.coordinator.step()  # returns, though there is nothing to do
    assert [len(each.output) for each in sequences] == [1, 1]
    assert house.coordinator.has_work
    house.coordinator.resume(DECODE)
    house.run()
    ticks = [given for given in notes.all("submitted") if given[1] is StepKind.DECODE]
    assert {rows for _, _, _, rows, _ in ticks} == {2}
    assert [each.output for each in sequences] == [expected_output(s, 4) for s in sequences]


def test_a_pause_outlives_a_turn_that_is_broken_off(monkeypatch: pytest.MonkeyPatch):
    house = deploy()
    sequence = house.submit("a")
    house.coordinator.pause(DECODE)
    with monkeypatch.context() as patch:
        patch.setattr(house.coordinator.loop, "_admit", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            house.coordinator.step()
    house.run_until(lambda: sequence.state is State.DECODING)
    house.coordinator.step()
    assert len(sequence.output) == 1
    house.coordinator.abort("a")
    house.run()


def test_an_unknown_engine_is_refused():
    house = deploy()
    with pytest.raises(ValueError, match="engine=decode/9: must be one of prefill/0, decode/0"):
        house.coordinator.pause(EngineId("decode/9"))
