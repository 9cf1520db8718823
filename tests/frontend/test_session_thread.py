"""A session whose own thread drives: it sleeps while there is no work, and outlives what breaks its
turns off; all other threads only wait."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdjax.core.outputs import RequestEvent
from pdjax.entry import Entry
from pdjax.host.loop import Loop
from pdjax.session import Closed
from tests.helpers.house import PATIENCE, House, exact, in_threads, raising, text_house


@pytest.fixture
def house() -> Iterator[House]:
    house = text_house()
    house.session.start()
    yield house
    house.session.close()
    house.check()


class Answers:
    """Answers that come as events, and a way to wait for so many."""

    def __init__(self) -> None:
        self.events: list[RequestEvent] = []
        self.ended = threading.Semaphore(0)

    def hear(self, event: RequestEvent) -> None:
        self.events.append(event)
        if event.output is not None:
            self.ended.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.ended.acquire(timeout=PATIENCE)


def driver() -> threading.Thread | None:
    return next((each for each in threading.enumerate() if each.name == "pdjax coordinator"), None)


def processor_seconds(thread: threading.Thread) -> float:
    fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_it_answers_though_nobody_drives(house: House):
    answers = Answers()
    for _ in range(4):
        house.session.submit(house.request(), on_event=answers.hear)
    answers.wait(4)
    house.session.start()
    assert sum(thread.name == "pdjax coordinator" for thread in threading.enumerate()) == 1


def test_threads_only_wait(house: House):
    exacts: list[bool] = []
    thread = driver()
    assert thread is not None

    def ask() -> None:
        for _ in range(10):
            exacts.extend(map(exact, house.generate(3)))

    def step() -> None:
        house.session.submit(house.request(max_tokens=30), patient=True)
        while house.session.has_work:
            house.session.step()
        house.session.step()  # nothing to wait for

    drivers: set[int] = set()
    coordinator = house.deployment.coordinator
    inner = coordinator.step

    def seen() -> Any:
        drivers.add(threading.get_ident())
        return inner()

    coordinator.step = seen  # type: ignore[method-assign]
    in_threads(*[ask] * 4, step)
    assert len(exacts) == 120 and all(exacts)
    assert drivers == {thread.ident}


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_it_sleeps_while_there_is_no_work(house: House):
    house.generate()
    thread = driver()
    assert thread is not None
    turns, spent = house.session._turns, processor_seconds(thread)
    time.sleep(0.3)
    assert house.session._turns - turns <= 1
    assert processor_seconds(thread) - spent <= 0.02
    assert all(map(exact, house.generate()))  # and is woken


def test_streams_of_threads(house: House):
    def read() -> None:
        stream = house.stream(max_tokens=20)
        tokens = [token for chunk in stream for token in chunk.token_ids]
        assert tokens == stream._entry.sequences[0].output and len(tokens) == 20

    in_threads(*[read] * 4)


def test_an_abort_ends_a_request_soon(house: House):
    answers = Answers()
    entry = house.session.submit(house.request(max_tokens=30), on_event=answers.hear)
    house.session.abort(entry.request.id)
    answers.wait(1)
    assert answers.events[-1].finish_reason == "abort"
    stream = house.stream(max_tokens=30)
    del stream
    deadline = time.monotonic() + PATIENCE
    while house.session.book.entries:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_when_it_stops_those_who_wait_drive():
    house = text_house()
    house.session.start()
    answers: list[Entry] = []
    started = threading.Event()

    def ask() -> None:
        started.set()
        for _ in range(8):
            answers.extend(house.generate(2, max_tokens=20))

    def stop() -> None:
        started.wait()
        house.session.stop()
        house.session.stop()

    in_threads(ask, ask, stop)
    assert len(answers) == 32 and all(map(exact, answers))
    assert driver() is None
    house.session.start()
    assert all(map(exact, house.generate()))
    house.session.close()


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt()])
def test_what_a_callback_raises_ends_its_request_alone(house: House, error: BaseException):
    guilty = house.session.submit(house.request(), on_text=raising(error))
    assert all(map(exact, house.generate(3)))
    answer = None
    while answer is None:
        answer = house.session.book.take(guilty.request.id)
    assert answer.finish_reason == "abort"
    assert str(answer.error).startswith(f"on_text: {type(error).__name__}")
    with pytest.raises(type(error)):
        house.session.step()
    assert all(map(exact, house.generate(3)))


def test_a_callback_may_submit_and_abort_but_not_close(house: House):
    answers, refused = Answers(), list[RuntimeError]()

    def hear(event: RequestEvent) -> None:
        if not refused:
            for call in (house.session.close, house.session.stop, house.session.step):
                with pytest.raises(RuntimeError, match="within a turn") as refusal:
                    call()
                refused.append(refusal.value)
            house.session.submit(house.request(), on_event=answers.hear)
            house.session.abort(event.request_id)

    first = house.session.submit(house.request(max_tokens=30), on_event=hear)
    answers.wait(1)
    assert len(refused) == 3 and answers.events[-1].finish_reason == "length"
    assert first.answer is not None and first.answer.finish_reason == "abort"


def test_turns_that_are_broken_off_for_good_are_told_and_those_that_are_not_go_on(
    house: House, monkeypatch: pytest.MonkeyPatch
):
    turn, left = Loop.turn, [2]

    def broken(loop: Loop, events: Any) -> bool:
        if left[0]:
            left[0] -= 1
            raise ZeroDivisionError("a policy")
        return turn(loop, events)

    monkeypatch.setattr(Loop, "turn", broken)
    assert all(map(exact, house.generate(2)))
    left[0] = 10**9
    entries = house.generate(2)
    for entry in entries:
        assert entry.answer is not None
        assert (entry.answer.finish_reason, entry.answer.error) == (
            "abort",
            "ZeroDivisionError: a policy",
        )
    left[0] = 0
    assert all(map(exact, house.generate(2)))
    with pytest.raises(ZeroDivisionError):
        house.session.step()


def test_a_signal_ends_the_requests_of_who_waits_in_the_main_thread(house: House):
    neighbour = house.session.submit(house.request(max_tokens=30), on_event=(a := Answers()).hear)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()

    def ask_on() -> None:
        while True:
            house.generate(max_tokens=30)

    with pytest.raises(KeyboardInterrupt):
        ask_on()
    timer.join()
    a.wait(1)
    assert exact(neighbour)
    assert all(map(exact, house.generate(2)))


def test_closing_ends_the_thread_and_everybody():
    house = text_house()
    house.session.start()
    entries = [house.session.submit(house.request(max_tokens=30)) for _ in range(3)]
    house.session.close()
    assert all(entry.answer is not None for entry in entries)
    assert driver() is None
    with pytest.raises(Closed):
        house.session.start()
    house.session.stop()


def test_a_program_that_forgets_to_close_ends():
    script = (
        "from tests.helpers.house import House\n"
        "house = House()\n"
        "house.session.start()\n"
        "house.generate()\n"
        "house.session.submit(house.request(max_tokens=30))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("has_thread", [True, False])
def test_calls_are_made_between_turns(house: House, has_thread: bool):
    session = house.session if has_thread else text_house().session

    def fail() -> None:
        raise ValueError("no such thing")

    stream = house.stream(max_tokens=30)
    assert session.call(lambda: session._turn.locked())
    with pytest.raises(ValueError, match="no such thing"):
        session.call(fail)
    stream.close()


def test_a_call_is_carried_out_though_the_thread_stops_and_none_after_the_end(house: House):
    outcome = house.session.call_soon(lambda: 1)
    house.session.stop()
    assert outcome.result(PATIENCE) == 1
    callback_calls: list[BaseException] = []

    def hear(event: RequestEvent) -> None:
        try:
            house.session.call(lambda: None)
        except RuntimeError as error:
            callback_calls.append(error)

    house.session.submit(house.request(max_tokens=2), on_event=hear)
    house.rest()
    assert callback_calls and "within a turn" in str(callback_calls[0])
    house.session.close()
    with pytest.raises(Closed):
        house.session.call(lambda: None)
