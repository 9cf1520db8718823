"""Events on a virtual clock come at their moments, in one order, and waiting is a jump."""

import pytest

from pdjax.core.clock import VirtualClock
from pdjax.core.ids import EngineId
from pdjax.interfaces.events import EngineLost, JobArrived, JobRead, StepDone, TimerDue
from pdjax.sim.events import NothingToCome, ScheduledEvents
from pdjax.sim.tickets import SimTicket

A, B = StepDone(EngineId("prefill/0")), StepDone(EngineId("decode/0"))


def setup() -> tuple[VirtualClock, ScheduledEvents]:
    clock = VirtualClock()
    return clock, ScheduledEvents(clock)


def test_events_come_at_their_moments_and_in_one_order():
    clock, events = setup()
    events.watch(SimTicket(clock, 2.0, None), A, queue="prefill/0")
    events.watch(SimTicket(clock, 1.0, None), B)
    events.at(2.0, TimerDue("second of that moment"))
    events.watch(SimTicket(clock, 2.0, None), JobRead(3))
    assert events.poll() == []
    events.wait()
    assert clock.now() == 1.0 and events.poll() == [B]
    events.wait()
    assert clock.now() == 2.0
    assert events.poll() == [A, TimerDue("second of that moment"), JobRead(3)]
    assert events.poll() == [] and events.told == 4


def test_moments_that_have_passed_are_told_at_once():
    clock, events = setup()
    clock.advance_to(5.0)
    events.at(1.0, TimerDue("late"))
    events.wait()
    assert clock.now() == 5.0 and events.poll() == [TimerDue("late")]


def test_what_is_posted_comes_first_and_ends_a_wait():
    clock, events = setup()
    events.at(0.0, TimerDue("now"))
    events.at(9.0, TimerDue("later"))
    events.post(EngineLost(EngineId("decode/0"), 1))
    events.wait()
    assert clock.now() == 0.0
    assert events.poll() == [EngineLost(EngineId("decode/0"), 1), TimerDue("now")]


def test_a_wake_ends_one_wait_without_an_event():
    clock, events = setup()
    events.at(9.0, TimerDue("later"))
    events.wake()
    events.wait()
    assert clock.now() == 0.0 and events.poll() == []
    events.wait()
    assert clock.now() == 9.0


def test_an_alarm_ends_a_wait_without_an_event_and_is_not_forgotten():
    clock, events = setup()
    events.at(9.0, TimerDue("later"))
    events.wake_at(3.0)
    events.forget()
    events.wait()
    assert clock.now() == 3.0 and events.poll() == []
    with pytest.raises(NothingToCome):
        events.wait()


def test_what_was_posted_is_not_forgotten():
    clock, events = setup()
    events.post(JobArrived(1))
    events.forget()
    events.wait()
    assert clock.now() == 0.0 and events.poll() == [JobArrived(1)]


def test_a_wait_that_would_never_end_is_an_error_that_says_so():
    clock, events = setup()
    clock.advance_to(1.5)
    with pytest.raises(NothingToCome, match=r"wait at 1.5 s: no ticket is watched and no timer"):
        events.wait()


def test_only_tickets_that_know_their_moment_can_be_watched():
    class Other:
        def ready(self) -> bool:
            return True

        def result(self) -> None:
            return None

    with pytest.raises(ValueError, match="does not know its moment"):
        setup()[1].watch(Other(), A)


def test_a_ticket_that_fails_keeps_its_moment():
    clock, events = setup()
    ticket = SimTicket(clock, 4.0, 7)
    events.watch(ticket, A)
    ticket.fail(RuntimeError("lost"))
    events.wait()
    assert clock.now() == 4.0 and events.poll() == [A] and ticket.ready()
    with pytest.raises(RuntimeError, match="lost"):
        ticket.result()
    ticket = SimTicket(clock, 3.0, 7)
    ticket.fail(RuntimeError("too late"))
    assert ticket.result() == 7
