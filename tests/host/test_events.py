"""Events by polling: what is told, when, and in which order."""

import threading
from typing import Any

import pytest

from pdjax.core.clock import VirtualClock, WallClock
from pdjax.core.ids import EngineId
from pdjax.host.events import PolledEvents, is_ready
from pdjax.interfaces.events import EngineLost, Event, JobArrived, JobRead, StepDone, TimerDue

A, B = StepDone(EngineId("a")), StepDone(EngineId("b"))


class Told:
    """A ticket that is ready when a test says so, and counts how often it is asked."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.done, self.asked, self.error = False, 0, error

    def ready(self) -> bool:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.done

    def result(self) -> Any:
        return None


def ready() -> Told:
    ticket = Told()
    ticket.done = True
    return ticket


class Naps(VirtualClock):
    """A clock on which something happens during a nap."""

    def __init__(self, tick: float = 0.001) -> None:
        super().__init__(tick)
        self.naps: list[int] = []
        self.then: Any = None

    def idle(self, turns: int = 1) -> None:
        super().idle(turns)
        self.naps.append(turns)
        if self.then is not None:
            self.then()


def test_a_ticket_is_told_of_once_when_it_is_ready():
    events, ticket = PolledEvents(VirtualClock()), Told()
    events.watch(ticket, JobArrived(7))
    assert list(events.poll()) == []
    ticket.done = True
    assert list(events.poll()) == [JobArrived(7)]
    assert list(events.poll()) == []
    assert ticket.asked == 2


def test_tickets_of_a_queue_are_told_of_in_its_order_and_only_the_first_is_asked():
    events, first, second = PolledEvents(VirtualClock()), Told(), ready()
    events.watch(first, A, "queue")
    events.watch(second, B, "queue")
    assert list(events.poll()) == []
    assert second.asked == 0
    first.done = True
    assert list(events.poll()) == [A, B]
    events.watch(ready(), A, "queue")
    assert list(events.poll()) == [A]


def test_the_same_event_may_be_told_more_than_once():
    events = PolledEvents(VirtualClock())
    for _ in range(3):
        events.watch(ready(), A, "queue")
    assert list(events.poll()) == [A, A, A]


def test_a_queue_holds_up_no_other_queue_and_no_ticket_without_one():
    events = PolledEvents(VirtualClock())
    events.watch(Told(), A, "a")
    events.watch(ready(), B, "b")
    events.watch(Told(), JobArrived(1))
    events.watch(ready(), JobRead(1))
    assert list(events.poll()) == [B, JobRead(1)]


def test_timers_are_told_of_in_their_order_when_they_are_due():
    clock = VirtualClock()
    events = PolledEvents(clock)
    for moment in (3.0, 1.0, 2.0, 1.0):
        events.at(moment, TimerDue(moment))
    assert list(events.poll()) == []
    clock.advance(1.0)
    assert list(events.poll()) == [TimerDue(1.0), TimerDue(1.0)]
    clock.advance(5.0)
    assert list(events.poll()) == [TimerDue(2.0), TimerDue(3.0)]
    events.at(2.0, TimerDue("past"))
    assert list(events.poll()) == [TimerDue("past")]


def test_timers_of_one_moment_need_not_be_comparable():
    events = PolledEvents(VirtualClock())
    events.at(0.0, TimerDue("a"))
    events.at(0.0, EngineLost(EngineId("a"), 1))
    assert list(events.poll()) == [TimerDue("a"), EngineLost(EngineId("a"), 1)]


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError()])
def test_a_ticket_that_raises_when_it_is_asked_is_ready(error):
    """Its error is read by `result`, as that of any work."""
    events = PolledEvents(VirtualClock())
    events.watch(Told(error), A)
    assert is_ready(Told(error))
    assert list(events.poll()) == [A]


def test_an_interrupt_while_a_ticket_is_asked_is_an_interrupt():
    events = PolledEvents(VirtualClock())
    ticket = Told(KeyboardInterrupt())
    events.watch(ticket, A)
    with pytest.raises(KeyboardInterrupt):
        events.poll()
    ticket.error, ticket.done = None, True
    assert list(events.poll()) == [A]


def test_a_wait_ends_after_a_bounded_time_though_nothing_happens():
    clock = Naps()
    events = PolledEvents(clock)
    events.watch(Told(), A)
    events.wait()
    assert clock.now() == pytest.approx(0.05, abs=0.002)
    assert clock.naps == list(range(1, len(clock.naps) + 1))
    assert list(events.poll()) == []


def test_a_wait_on_a_clock_that_jumps_jumps_once():
    clock = VirtualClock(tick=1.0)
    PolledEvents(clock).wait()
    assert clock.now() == 1


def test_a_wait_ends_when_a_ticket_is_ready_and_keeps_what_it_has_seen():
    clock, ticket = Naps(), Told()
    events = PolledEvents(clock)
    events.watch(ticket, A)
    clock.then = lambda: setattr(ticket, "done", len(clock.naps) == 3)
    events.wait()
    assert len(clock.naps) == 3
    events.wait()  # what has been seen has not been told yet
    assert len(clock.naps) == 3
    assert list(events.poll()) == [A]


def test_a_wait_ends_when_a_timer_is_due():
    clock = Naps()
    events = PolledEvents(clock)
    events.at(0.0035, TimerDue("x"))
    events.wait()
    assert clock.now() == pytest.approx(0.004)
    assert list(events.poll()) == [TimerDue("x")]


@pytest.mark.parametrize("how", ["wake", "post"])
def test_a_call_in_the_middle_of_a_wait_ends_it(how):
    clock = Naps()
    events = PolledEvents(clock)

    def call() -> None:
        if len(clock.naps) == 2:
            events.wake() if how == "wake" else events.post(A)

    clock.then = call
    events.wait()
    assert len(clock.naps) == 2
    assert list(events.poll()) == ([] if how == "wake" else [A])
    events.wait()
    assert len(clock.naps) > 40, "it ends one wait"


def test_a_wake_before_a_wait_ends_that_one_whatever_is_polled_in_between():
    """What woke it may have come after the caller has looked, and before it polls."""
    clock = Naps()
    events = PolledEvents(clock)
    events.wake()
    assert list(events.poll()) == []
    events.wait()
    assert not clock.naps
    events.wait()
    assert clock.naps


def test_another_thread_posts_and_ends_a_wait():
    """All that it posts is told, in its order, and the waiting thread does not wait in vain."""
    events, got = PolledEvents(WallClock()), list[Event]()
    posted = [JobArrived(number) for number in range(500)]

    def post() -> None:
        for event in posted:
            events.post(event)

    thread = threading.Thread(target=post)
    thread.start()
    for _ in range(10_000):
        if len(got) == len(posted):
            break
        events.wait()
        got += events.poll()
    thread.join()
    assert got == posted


def test_what_is_forgotten_is_not_told_but_what_was_posted_is():
    clock = Naps()
    events = PolledEvents(clock)
    events.watch(ready(), A, "queue")
    events.watch(ready(), JobArrived(1))
    events.at(0.0, TimerDue("x"))
    events.post(EngineLost(EngineId("a"), 1))
    events.wait()
    events.forget()
    assert list(events.poll()) == [EngineLost(EngineId("a"), 1)]
    events.watch(ready(), B, "queue")
    assert list(events.poll()) == [B]


def test_what_a_wait_has_seen_is_forgotten_too():
    clock = Naps()
    events = PolledEvents(clock)
    events.watch(ready(), A)
    events.wait()
    events.forget()
    assert list(events.poll()) == []
