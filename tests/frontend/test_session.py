"""One book for many threads: who drives, who sleeps, what an interrupt, a finaliser or a callback
may come between. Fakes and short waits; tests/e2e/test_survival.py has the real engines."""

import gc
import signal
import threading
import time
from typing import Any

import pytest

from pdjax.core.interrupts import held_interrupts
from pdjax.core.request import QueueFull
from pdjax.entry import Entry
from pdjax.session import Closed
from tests.helpers.house import PATIENCE, House, exact, in_threads


def test_many_threads_each_get_their_own_answers():
    house, exacts = House(), list[bool]()

    def ask() -> None:
        for _ in range(10):
            exacts.extend(map(exact, house.generate(3)))

    in_threads(*[ask] * 12)
    assert len(exacts) == 360 and all(exacts)
    house.rest()


def test_who_waits_takes_over_when_the_driver_leaves():
    house = House()
    long: list[Entry] = []
    in_threads(lambda: house.generate(), lambda: long.extend(house.generate(max_tokens=30)))
    assert exact(long[0]) and len(long[0].sequences[0].output) == 30
    house.rest()


def test_a_step_beside_a_generate_ends_with_the_turn():
    house, steps = House(), [0]

    def step() -> None:
        for _ in range(5):
            house.session.step()
            steps[0] += 1

    in_threads(lambda: house.generate(4, max_tokens=30), step)
    assert steps[0] == 5
    house.rest()


def test_a_patient_request_waits_for_room_and_another_is_refused():
    house = House()  # max_waiting is 4
    for _ in range(3):
        house.session.submit(house.request())
    house.session.submit(house.request(temperature=1.0, n=2), patient=True)
    with pytest.raises(QueueFull, match="5 sequences wait already; n=1 more do not fit into a"):
        house.session.submit(house.request())
    house.rest()
    assert len(house.generate(20)) == 20


def test_an_abort_in_the_inbox_is_answered():
    house = House()
    for _ in range(6):
        house.session.submit(house.request(), patient=True)
    last = house.session.submit(house.request(), patient=True)
    house.session.abort(last.request.id)
    assert last.answer is not None and last.answer.finish_reason == "abort"
    house.rest()


def test_an_abort_from_another_thread_is_carried_out_though_nobody_drives_again():
    house = House()
    victim = house.session.submit(house.request(max_tokens=30))
    in_threads(lambda: house.session.abort(victim.request.id))
    assert victim.answer is not None and victim.answer.finish_reason == "abort"
    house.rest()


def test_a_stream_that_the_collector_finds_in_the_middle_of_a_turn_is_aborted_after_it(monkeypatch):
    house = House()
    neighbour = house.session.submit(house.request(max_tokens=20))
    cycle: list[Any] = [house.stream(max_tokens=30)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    engine = house.deployment.decode[0]
    submit, collected = engine.submit, list[int]()

    def collect_first(step: Any) -> Any:
        monkeypatch.setattr(engine, "submit", submit)
        collected.append(gc.collect())
        return submit(step)

    monkeypatch.setattr(engine, "submit", collect_first)
    house.rest()
    assert collected[0] > 0 and len(collected) == 1
    assert exact(neighbour)


def test_a_slow_reader_of_a_stream_holds_up_nobody():
    house = House()
    stream = house.stream(max_tokens=30)
    assert all(map(exact, house.generate(4)))
    chunks = list(stream)
    output = chunks[-1].output
    assert output is not None and len(output.token_ids) == 30
    assert [token for chunk in chunks for token in chunk.token_ids] == output.token_ids
    house.rest()


def test_closing_ends_everybody_and_is_final():
    house, answers = House(), list[Entry]()
    entry = house.session.submit(house.request(max_tokens=30))
    started = threading.Event()

    def ask_on() -> None:
        started.set()
        while True:
            answers.extend(house.generate(2, max_tokens=30))

    def ask() -> None:
        with pytest.raises(Closed):
            ask_on()

    def close() -> None:
        started.wait()
        house.session.close()

    in_threads(ask, close)
    assert entry.answer is not None
    assert all(each.answer is not None for each in answers)
    house.session.close()
    house.rest()
    with pytest.raises(Closed, match="this LLM is closed"):
        house.session.submit(house.request())


def test_what_breaks_a_turn_off_is_its_drivers_and_everybody_goes_on(monkeypatch):
    house = House()
    entries = [house.session.submit(house.request()) for _ in range(3)]
    policy: Any = house.deployment.coordinator._policies.prefill

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("a policy")

    with monkeypatch.context() as patch:
        patch.setattr(policy, "plan", broken)
        with pytest.raises(ZeroDivisionError):
            house.session.step()
    house.rest()
    assert all(map(exact, entries))


def test_an_interrupt_is_held_until_the_turn_has_ended():
    seen: list[str] = []

    def press() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            seen.append("the block goes on")
        seen.append("never")

    with pytest.raises(KeyboardInterrupt):
        press()
    assert seen == ["the block goes on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_breaks_off_a_block_that_does_not_end():
    def press() -> None:
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second one comes at once")

    with pytest.raises(KeyboardInterrupt):
        press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupts_are_as_they_were_in_other_threads_and_where_they_are_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

    def hold() -> None:
        with held_interrupts():
            assert signal.getsignal(signal.SIGINT) is before

    in_threads(hold)


def test_a_signal_while_a_turn_runs_aborts_the_requests_of_its_own_thread(monkeypatch):
    house, other = House(), list[Entry]()
    engine = house.deployment.decode[0]
    submit = engine.submit

    def press(step: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            monkeypatch.setattr(engine, "submit", submit)
            signal.raise_signal(signal.SIGINT)
        else:
            time.sleep(0.001)
        return submit(step)

    monkeypatch.setattr(engine, "submit", press)
    thread = threading.Thread(target=lambda: other.extend(house.generate(2, max_tokens=30)))
    thread.start()

    def step_on() -> None:
        for _ in range(1000):
            house.session.submit(house.request(), patient=True)
            house.session.step()

    with pytest.raises(KeyboardInterrupt):
        step_on()
    thread.join(PATIENCE)
    assert all(map(exact, other)) and len(other) == 2
    house.rest()
