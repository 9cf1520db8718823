"""Threads that dispatch, so that the thread that drives other devices need not wait meanwhile.

To dispatch is work of the host: XLA launches a program's kernels from the thread that calls it,
which takes a millisecond or two for a layer group of a large model, and a token of decode that is
due meanwhile is seen so much later. XLA lets go of Python's lock while it launches: two threads,
each for devices of its own, hardly wait for one another.

A worker belongs to a set of devices. Whatever the engines on these devices are asked, and whatever
is read from their pools or written to them, goes through the worker's queue in the order of the
calls. So the promises of `interfaces` hold and nothing else here needs a lock, and two threads
never start programs on one device in an order of their own, which could let collectives wait for
one another for good. Devices without a worker are dispatched to at once, by the thread that calls.

The moments that the host notes down are those at which it has asked.
"""

import atexit
import contextlib
import signal
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from pdjax.interfaces.tickets import Ticket

ResultT = TypeVar("ResultT")
FutureT = TypeVar("FutureT", bound="DispatchFuture[Any]")


class DispatchFuture(Generic[ResultT]):
    """A call that dispatches work, and the ticket of that work. An error of the call is the work's:
    `result` raises it.

    Args:
      call: returns the ticket of the work that it has dispatched.

    Attributes:
      made: whether the call has been made, or given up.
    """

    def __init__(self, call: Callable[[], Ticket[ResultT]]) -> None:
        self._call: Callable[[], Ticket[ResultT]] | None = call
        self._making = threading.Lock()
        # As an event, which takes several times as long to make: one is made for every tick.
        self._pending = threading.Lock()
        self._pending.acquire()
        self.made = False
        self._ticket: Ticket[ResultT] | None = None
        self._error: BaseException | None = None

    def make(self) -> None:
        """Make the call, unless it has been made or given up.

        Raises:
          BaseException: an interrupt; also the ticket's error then.
        """
        with self._making:
            if self._call is None:
                return
            try:
                self._ticket = self._call()
            except BaseException as error:
                self._error = error
                if not isinstance(error, Exception):
                    raise
            finally:
                self._end()

    def give_up(self, error: BaseException) -> bool:
        """Never make the call: `error` is what comes of it. Waits while the call is being made.

        Returns:
          False if the call has been made, and True if it never will be.
        """
        with self._making:
            if self._call is None:
                return False
            self._error = error
            self._end()
            return True

    def _end(self) -> None:
        """The call has been made, or never will be."""
        self._call = None  # and what it holds
        self.made = True
        self._pending.release()

    @property
    def ticket(self) -> Ticket[ResultT]:
        """Of the work; waits for the call.

        Raises:
          BaseException: what the call has raised.
        """
        if not self.made:
            self.wait()
        if self._error is not None:
            raise self._error
        assert self._ticket is not None
        return self._ticket

    @property
    def failed(self) -> bool:
        """Whether the call has raised, or was given up. Work that fails later does not count."""
        return self._error is not None

    def wait(self, seconds: float = -1) -> bool:
        """Wait for the call, so long at most unless that is negative; whether it has been made."""
        if self._pending.acquire(timeout=seconds):
            self._pending.release()  # for other threads that wait
        return self.made

    def ready(self) -> bool:
        return self.made and (self._error is not None or self.ticket.ready())

    def result(self) -> ResultT:
        return self.ticket.result()


class Done(Generic[ResultT]):
    """A ticket of work that has ended."""

    def __init__(self, outcome: ResultT) -> None:
        self._outcome = outcome

    def ready(self) -> bool:
        return True

    def result(self) -> ResultT:
        return self._outcome


Queue = SimpleQueue[DispatchFuture[Any] | None]

_END_SECONDS = 60.0
"""How long a process that ends waits for what has been asked to be dispatched."""

_LOOK_SECONDS = 0.1
"""How often a thread that waits for a worker looks whether the worker still runs."""


class DispatchWorker:
    """A thread, and the queue of the calls that it makes. The thread ends when the worker is
    collected, or with the process: XLA must not be called while the process is taken down."""

    def __init__(self) -> None:
        self._queue: Queue = SimpleQueue()
        weakref.finalize(self, self._queue.put, None)
        end_with_process(self)
        self.thread = threading.Thread(
            target=_make_all, args=(self._queue,), name="pdjax dispatch", daemon=True
        )
        self.thread.start()

    def give(self, future: DispatchFuture[Any]) -> None:
        """Make the call of a future after those of all that were given before."""
        self._queue.put(future)

    def rest(self) -> None:
        """Wait until all calls that were given have been made. A worker whose thread has ended has
        made them."""
        last = DispatchFuture(lambda: Done(None))
        self.give(last)
        while self.thread.is_alive() and not last.wait(_LOOK_SECONDS):
            pass

    def end(self, seconds: float) -> None:
        """End the thread after the calls that were given; wait so long at most."""
        self._queue.put(None)
        self.thread.join(seconds)


def ask(worker: DispatchWorker | None, future: FutureT) -> FutureT:
    """Have a worker make the call of a future, in its turn, or make it at once if there is no
    worker. Returns the future.

    Raises:
      BaseException: an interrupt.
    """
    if worker is None:
        future.make()
    else:
        worker.give(future)
    return future


class Ends(Protocol):
    """What has threads that call XLA."""

    def end(self, seconds: float) -> None:
        """Let them end as soon as may be; wait so long at most for each."""
        ...


_alive: "weakref.WeakSet[Ends]" = weakref.WeakSet()


def end_with_process(threads: Ends) -> None:
    """End threads before JAX takes its clients down."""
    _alive.add(threads)


@atexit.register  # after JAX did so, and so before JAX takes its clients down
def _end_all() -> None:
    # A thread that Python stops within XLA aborts the process. So the process ignores Ctrl-C while
    # it waits, unless SIGINT has a handler that is not Python's.
    waits = _alive and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waits:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for worker in list(_alive):
        worker.end(_END_SECONDS)
    if waits:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _make_all(queue: Queue) -> None:
    """Make the calls in a queue until it says None. No future is held while the next one is waited
    for: an engine would outlive its last step."""
    while (future := queue.get()) is not None:
        with contextlib.suppress(BaseException):  # the future keeps it
            future.make()
        del future
