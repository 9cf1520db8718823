"""A session goes on when callbacks raise, when several threads read, abort and close at once, and
when what repairs a turn is broken off itself."""

import signal
import threading
from typing import Any

import pytest

from pdjax.entry import Entry, Listener
from pdjax.host.loop import Loop
from pdjax.host.sequences.lifecycle import SequenceLifecycle
from pdjax.session import Closed
from tests.helpers.deployment import LAYOUT
from tests.helpers.fakes import expected_output
from tests.helpers.house import PATIENCE, House, exact, in_threads, raising, text_house


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError("no words")


def test_who_waits_is_woken_by_an_abort_that_kept_it_from_driving(monkeypatch):
    house, entries = House(), list[Entry]()
    victim = house.session.submit(house.request(max_tokens=30))
    within, turned_away = threading.Event(), threading.Event()
    coordinator: Any = house.deployment.coordinator
    abort = coordinator.abort

    def slow_abort(request_id: str) -> bool:
        within.set()
        assert turned_away.wait(PATIENCE)
        return abort(request_id)

    def generate() -> None:
        assert within.wait(PATIENCE)
        listener: Any = Listener()
        entries.append(house.session.submit(house.request(), listener=listener))
        wait = listener.event.wait

        def sleep() -> None:
            turned_away.set()
            wait()

        listener.event.wait = sleep
        house.session.wait_for(entries, listener, lambda done: None)

    monkeypatch.setattr(coordinator, "abort", slow_abort)
    in_threads(generate, lambda: house.session.abort(victim.request.id))
    assert exact(entries[0])
    house.rest()


@pytest.mark.parametrize("error", [Unspeakable(), SystemExit(3), GeneratorExit(), ValueError("x")])
def test_what_a_callback_raises_hurts_no_other_thread(error):
    house = text_house()
    guilty: list[Entry] = []
    in_threads(lambda: guilty.append(house.session.submit(house.request(), on_text=raising(error))))
    assert all(map(exact, house.generate(3)))
    answer = guilty[0].answer
    assert answer is not None and answer.finish_reason == "abort"
    assert str(answer.error).startswith(f"on_text: {type(error).__name__}")
    with pytest.raises(type(error)):
        house.session.step()
    house.rest()


def test_an_exit_in_a_callback_is_its_own_threads():
    house = text_house()
    house.session.submit(house.request(), on_text=raising(SystemExit(3)))
    with pytest.raises(SystemExit):
        house.generate()
    house.rest()


def test_errors_of_callbacks_that_nobody_steps_for_are_bounded():
    house = text_house()
    for _ in range(40):
        house.session.submit(house.request(), on_text=raising(ValueError("x")), patient=True)
    house.generate()
    assert len(house.session._errors) <= 16


def test_a_key_that_is_pressed_while_requests_are_aborted_spares_none(monkeypatch):
    house = House()
    entries = [house.session.submit(house.request(max_tokens=30)) for _ in range(4)]
    coordinator: Any = house.deployment.coordinator
    abort = coordinator.abort

    def press(request_id: str) -> bool:
        monkeypatch.setattr(coordinator, "abort", abort)
        signal.raise_signal(signal.SIGINT)
        return abort(request_id)

    monkeypatch.setattr(coordinator, "abort", press)
    with pytest.raises(KeyboardInterrupt):
        house.session.abort(*(entry.request.id for entry in entries))
    assert [entry.answer and entry.answer.finish_reason for entry in entries] == ["abort"] * 4
    house.rest()


def test_closing_in_a_callback_is_refused_and_closes_nothing():
    house, refused = text_house(), list[RuntimeError]()

    def close(text: str) -> None:
        with pytest.raises(RuntimeError, match="within a turn") as refusal:
            house.session.close()
        refused.append(refusal.value)

    entry = house.session.submit(house.request(), on_text=close)
    assert all(map(exact, house.generate(2)))
    house.rest()
    assert exact(entry) and refused


def test_who_steps_for_an_answer_learns_that_the_session_is_closed():
    house = House()
    entry = house.session.submit(house.request(max_tokens=30))
    house.session.close()
    assert house.session.book.take(entry.request.id) is None
    with pytest.raises(Closed):
        house.session.step()


def test_readers_of_one_stream_share_its_chunks():
    house, tokens = House(), list[int]()
    stream = house.stream(max_tokens=30)

    def read() -> None:
        for chunk in stream:
            tokens.extend(chunk.token_ids)

    in_threads(*[read] * 4, lambda: house.generate(4, max_tokens=30))
    assert sorted(tokens) == sorted(stream._entry.sequences[0].output) and len(tokens) == 30
    house.rest()


def test_a_stream_has_all_its_tokens_though_its_last_turn_was_broken_off(monkeypatch):
    house = House()
    stream = house.stream(max_tokens=6)
    broken = 0

    def late_in_a_turn(loop: Loop) -> None:
        nonlocal broken
        if loop.lifecycle.has_news:
            broken += 1
            raise ZeroDivisionError("late in a turn")

    monkeypatch.setattr(Loop, "_give_back", late_in_a_turn)
    tokens: list[int] = []
    for _ in range(100):
        try:
            for chunk in stream:
                tokens += chunk.token_ids
            break
        except ZeroDivisionError:
            pass
    assert broken > 1 and len(tokens) == 6
    assert tokens == expected_output(stream._entry.sequences[0], LAYOUT.num_layers)


def test_a_new_beginning_that_is_interrupted_is_made_at_the_next_turn(monkeypatch):
    house = House()
    entries = [house.session.submit(house.request()) for _ in range(2)]
    house.session.step()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SequenceLifecycle, "take_over", interrupt)
        patch.setattr(Loop, "turn", interrupt)
        with pytest.raises(KeyboardInterrupt):
            house.session.step()
    house.rest()
    assert all(map(exact, entries))
