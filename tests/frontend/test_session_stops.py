"""A stop string that is found late: whoever makes the text ends a choice that has gone on."""

import random
from collections.abc import Callable

import pytest

from pdjax.core.outputs import RequestEvent
from pdjax.entry import Entry, Stop
from pdjax.host.sequences.sequence import LEGAL_MOVES, State
from tests.helpers.house import House, exact, text_house


def until(house: House, condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        house.session.step()
    raise AssertionError("it never came to that")


def reaching(house: House, state: State, **params: int | float) -> Entry:
    """A request whose first choice has come to a state, and has a token where it can have one."""
    deployment = house.deployment
    if state is State.PREFILLED:
        deployment.coordinator.pause(deployment.decode[0].id)
        for _ in range(2):  # they take the rows
            house.session.submit(house.request(max_tokens=30))
    entry = house.session.submit(house.request(max_tokens=30, **params), makes_text=False)
    until(house, lambda: entry.sequences[0].state is state)
    return entry


@pytest.mark.parametrize("state", [State.PREFILLED, State.DECODING])
def test_a_stop_ends_a_choice_wherever_it_is_and_frees_what_it_holds(state: State):
    house = House()
    entry = reaching(house, state)
    [sequence] = entry.sequences
    while state is State.DECODING and len(sequence.output) < 6:
        house.session.step()
    before = list(sequence.output)
    house.session.stop_soon(Stop(entry.request.id, 0, len(before) - 1, "END"))
    house.session.step()
    assert sequence.state is State.FINISHED and not sequence.pages
    assert entry.answer is not None
    [choice] = entry.answer.choices
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "END")
    assert choice.token_ids == before[:-1]
    assert choice.metrics.output_tokens == len(before) - 1
    for engine in house.deployment.decode:
        house.deployment.coordinator.resume(engine.id)
    house.rest()


def test_a_stop_of_one_choice_leaves_the_others():
    house = House()
    entry = house.session.submit(house.request(max_tokens=12, temperature=1.0, n=2))
    until(house, lambda: all(len(each.output) > 2 for each in entry.sequences))
    house.session.stop_soon(Stop(entry.request.id, 1, 2, "x"))
    house.rest()
    assert entry.answer is not None
    assert [len(each.token_ids) for each in entry.answer.choices] == [12, 2]
    assert [each.finish_reason for each in entry.answer.choices] == ["length", "stop"]


def test_a_stop_that_comes_too_late_changes_nothing():
    house = House()
    [entry] = house.generate(1)
    house.session.stop_soon(Stop(entry.request.id, 0, 1, "x"))
    house.session.stop_soon(Stop("nobody", 0, 1, "x"))
    house.rest()
    assert exact(entry)


def test_text_that_others_make_is_not_made_here():
    house, told = text_house(), list[RequestEvent]()
    entries = [
        house.session.submit(house.request(), on_event=told.append, makes_text=makes)
        for makes in (True, False)
    ]
    house.rest()
    texts = {entry.request.id: "" for entry in entries}
    for event in told:
        texts[event.request_id] += event.text
    assert list(texts.values()) == ["x" * 5, ""]


def test_a_storm_of_stops_leaves_nothing_behind():
    house, chance = House(), random.Random(5)
    cut: dict[str, int] = {}
    entries = list[Entry]()
    for _ in range(60):
        entries.append(house.session.submit(house.request(max_tokens=20), patient=True))
        for _ in range(chance.randrange(6)):
            house.session.step()
        entry = chance.choice(entries)
        [sequence] = entry.sequences
        if sequence.output and not sequence.done:
            tokens = chance.randint(1, len(sequence.output))
            cut.setdefault(entry.request.id, tokens)
            house.session.stop_soon(Stop(entry.request.id, 0, tokens, "x"))
    house.rest()
    assert len(cut) > 5
    for entry in entries:
        assert entry.answer is not None
        expected = cut.get(entry.request.id, 20)
        assert len(entry.answer.token_ids) == expected


def test_every_live_state_may_finish():
    assert all(State.FINISHED in moves for moves in LEGAL_MOVES.values() if moves)
