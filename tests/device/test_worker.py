"""Workers: calls in the order in which they were given, errors that are the ticket's, and threads
that end in time."""

import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest

from pdjax.device.worker import DispatchFuture, DispatchWorker, Done, ask


def told(seen: list[Any], what: Any) -> DispatchFuture[Any]:
    """A call that notes what, and the thread that makes it."""

    def call() -> Done[Any]:
        seen.append((what, threading.get_ident()))
        return Done(what)

    return DispatchFuture(call)


def raising(error: BaseException) -> DispatchFuture[Any]:
    def call() -> Done[Any]:
        raise error

    return DispatchFuture(call)


def test_a_worker_makes_calls_in_order_and_who_gives_them_does_not_wait():
    worker, seen, hold = DispatchWorker(), list[Any](), threading.Event()
    held = ask(worker, DispatchFuture(lambda: Done(hold.wait(10))))
    futures = [ask(worker, told(seen, number)) for number in range(3)]
    assert not held.ready() and not futures[0].ready() and not seen
    hold.set()
    assert [each.result() for each in futures] == [0, 1, 2]
    assert [what for what, _ in seen] == [0, 1, 2]
    assert {thread for _, thread in seen} == {worker.thread.ident}


def test_without_a_worker_a_call_is_made_at_once():
    seen: list[Any] = []
    future = ask(None, told(seen, "now"))
    assert seen == [("now", threading.get_ident())] and future.ready()
    future.make()  # has been made
    assert len(seen) == 1 and future.result() == "now"


@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_is_the_tickets_and_the_next_call_is_made(threaded):
    worker = DispatchWorker() if threaded else None
    bad = ask(worker, raising(RuntimeError("bad")))
    good = ask(worker, told([], "good"))
    assert good.result() == "good"
    assert bad.ready() and bad.failed
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bad"):
            bad.result()


def test_an_interrupt_leaves_a_call_that_the_caller_makes():
    future = raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        ask(None, future)
    assert future.made and future.failed  # no thread waits for it
    worker = DispatchWorker()
    ask(worker, raising(KeyboardInterrupt()))
    assert ask(worker, told([], "goes on")).result() == "goes on"


def test_a_call_that_was_given_up_is_never_made():
    seen: list[Any] = []
    future = told(seen, "never")
    assert future.give_up(RuntimeError("no more"))
    future.make()
    assert not seen and future.ready()
    with pytest.raises(RuntimeError, match="no more"):
        future.result()
    made = told(seen, "made")
    made.make()
    assert not made.give_up(RuntimeError("too late")) and made.result() == "made"


def test_giving_up_waits_for_a_call_that_is_being_made():
    worker, begun, hold = DispatchWorker(), threading.Event(), threading.Event()

    def call() -> Done[str]:
        begun.set()
        hold.wait(10)
        return Done("made")

    future = ask(worker, DispatchFuture(call))
    begun.wait(10)
    threading.Timer(0.05, hold.set).start()
    assert not future.give_up(RuntimeError("too late")) and future.result() == "made"


def test_rest_waits_for_all_that_was_given():
    worker, seen = DispatchWorker(), list[Any]()
    for number in range(5):
        ask(worker, told(seen, number))
    worker.rest()
    assert [what for what, _ in seen] == [0, 1, 2, 3, 4]


def test_rest_does_not_wait_for_a_thread_that_has_ended():
    worker = DispatchWorker()
    last = ask(worker, told([], "last"))
    worker.end(10)
    assert last.result() == "last"
    worker.rest()


def test_the_thread_ends_with_its_worker_and_holds_no_call():
    class Engine:
        pages = 3

    worker, engine = DispatchWorker(), Engine()
    kept = weakref.ref(engine)
    future = DispatchFuture(lambda engine=engine: Done(engine.pages))  # type: ignore[misc]
    assert ask(worker, future).result() == 3
    [thread] = [each for each in threading.enumerate() if each is worker.thread]
    del worker, engine, future
    assert kept() is None
    thread.join(10)
    assert not thread.is_alive()


def test_an_interrupt_at_the_end_of_the_process_waits_for_the_thread():
    """Or Python would stop it wherever it is, and within XLA that aborts."""
    program = """
import atexit, os, signal, sys, threading, time
from pdjax.device.worker import DispatchFuture, DispatchWorker, Done

ends = threading.Event()

def work():
    ends.wait()
    for _ in range(3):
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
    print("dispatched", flush=True)
    return Done(None)

worker = DispatchWorker()
worker.give(DispatchFuture(work))
atexit.register(ends.set)
sys.exit(3)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, "dispatched\n", "")
