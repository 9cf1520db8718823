"""A session: the requests of one coordinator, safe from any thread. `LLM` is thin on it.

Any thread submits and aborts, which the inbox notes. A thread that waits for an answer drives the
turns of the coordinator. Of several threads one drives; the others sleep until there is news of
their requests, or until no thread drives. So a program with one thread runs as if there were no
session. After `start` a thread of the session's own drives, and all others only wait.

    inbox -> coordinator.step -> events of each request go to its `on_event`

Ctrl-C never breaks a turn off, and what a callback raises ends its own request alone.
"""

import atexit
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

from pdjax.book import Book
from pdjax.coordinator_thread import CoordinatorThread
from pdjax.core.interrupts import held_interrupts
from pdjax.core.messages import reason_of
from pdjax.core.outputs import RequestEvent
from pdjax.core.request import Request
from pdjax.entry import Call, Entry, Inbox, Listener, Stop, text_of_first_choice
from pdjax.host.coordinator import Coordinator
from pdjax.host.metrics.recorder import Recorder
from pdjax.listeners import Listeners

ResultT = TypeVar("ResultT")


class Closed(RuntimeError):
    """The session has been closed; nothing is served any more."""


_MOST_ERRORS = 16
"""Errors that are kept for `step`; if no step comes, older ones are dropped."""


class Session:
    """The requests of one coordinator; safe from any thread.

    Args:
      coordinator: driven by this session alone.
      recorder: has the metrics of each sequence.

    Attributes:
      book: has the requests; to be read.
      after_turns: called after each turn, by the thread that drives; they raise nothing.
    """

    def __init__(self, coordinator: Coordinator, recorder: Recorder) -> None:
        self._coordinator = coordinator
        self._turn = threading.Lock()  # held by the thread that drives
        self._driver: int | None = None  # that thread
        self._turns = 0
        self._thread: CoordinatorThread | None = None  # drives instead of those who wait
        self._admission = threading.Lock()
        self._inbox = Inbox()
        self.book = Book(recorder, self.abort_soon, self._callback_failed)
        self._listeners = Listeners()
        self._errors: deque[BaseException] = deque(maxlen=_MOST_ERRORS)  # that `step` has to raise
        self._broken_off: BaseException | None = None  # by a callback: the turn ends with it
        self._closed = False
        self.after_turns: list[Callable[[], None]] = []

    # What any thread may call.

    def submit(
        self,
        request: Request,
        prompt: str | None = None,
        *,
        listener: Listener | None = None,
        on_event: Callable[[RequestEvent], None] | None = None,
        on_text: Callable[[str], None] | None = None,
        whole: bool = False,
        streams: bool = False,
        patient: bool = False,
        makes_text: bool = True,
    ) -> Entry:
        """Put a request into the inbox.

        Args:
          request: its id is in use by no other.
          prompt: its text, where it was text.
          listener: as in Entry.
          on_event: called with what is new of each choice, from within a turn, by the thread that
            drives it; so it must return soon. What it raises ends the request.
          on_text: in place of `on_event`, called with further text of the first choice.
          whole: whether `on_event` is called once for each choice, at its end.
          streams: whether events are kept in the entry, instead of `on_event`.
          patient: whether it waits in the inbox for room in the queue, instead of being refused.
          makes_text: whether its tokens become text here. Where they do not, the caller finds its
            stop strings; see `stop_soon`.

        Raises:
          ValueError: it can never be served.
          QueueFull: the queue has no room.
          Closed: the session has been closed.
        """
        self._coordinator.check_request(request)
        with held_interrupts(), self._admission:
            if self._closed:
                raise Closed("this LLM is closed")
            if not patient:
                arriving = sum(len(entry.sequences) for entry in list(self._inbox.arrivals))
                self._coordinator.check_room(request.params.n, arriving)
            sequences = self._coordinator.sequences_of(request, makes_text=makes_text)
            events: deque[RequestEvent] | None = deque() if streams else None
            entry = Entry(
                request, prompt, sequences, listener, on_event, whole=whole, events=events
            )
            if events is not None:
                entry.on_event = events.append
            elif on_text is not None:
                entry.on_event, entry.callback = text_of_first_choice(on_text), "on_text"
            entry.is_taken = on_event is None
            self.book.add(entry)
            self._inbox.arrivals.append(entry)
            self._wake()
        return entry

    def abort(self, *request_ids: str) -> None:
        """End requests wherever they are; at once, unless another thread, or a caller of this one,
        is in the middle of a turn, or the session has a thread of its own. Then the next turn
        begins with it. Ctrl-C comes when all of them are noted."""
        with held_interrupts():
            for request_id in request_ids:
                self.abort_soon(request_id)
            self._attend()

    def abort_soon(self, request_id: str) -> None:
        """Note that a request is to be ended. Takes no lock, so that a finaliser may call it
        wherever the collector runs it."""
        self._inbox.aborts.append(request_id)
        self._wake()

    def stop_soon(self, stop: Stop) -> None:
        """Note that a choice has come to a stop string. Its answer has the tokens up to there, and
        frees what it holds with the next turn."""
        self._inbox.stops.append(stop)
        self._wake()

    def call_soon(self, function: Callable[[], ResultT]) -> Future[ResultT]:
        """Note what is to be called between two turns, by the thread that drives them, such as a
        change to the coordinator.

        Returns:
          what it returns, or the Exception that it raises.

        Raises:
          Closed: the session has been closed.
        """
        outcome = Future[ResultT]()
        with held_interrupts(), self._admission:
            if self._closed:
                raise Closed("this LLM is closed")
            self._inbox.calls.append(Call(function, outcome))
            self._wake()
        return outcome

    def call(self, function: Callable[[], ResultT]) -> ResultT:
        """Call it between two turns: at once, unless another thread is in the middle of one.

        Raises:
          Exception: what it raises.
          Closed: the session has been closed.
          RuntimeError: the caller is a callback of a turn.
        """
        self.refuse_within_turn()
        outcome = self.call_soon(function)
        with held_interrupts():
            self._attend()
        return outcome.result()

    @property
    def has_work(self) -> bool:
        """Whether a turn may still bring something."""
        return bool(self._inbox) or self._coordinator.has_work

    # A thread of the session's own.

    def start(self) -> None:
        """Let a daemon thread drive the turns from now on, until `stop` or `close`. It sleeps while
        there is no work. A second call does nothing.

        A turn that is broken off is logged, and the next `step` raises its error. After three in a
        row, all requests are aborted, with the error in their answers.

        Raises:
          Closed: the session has been closed.
        """
        with self._admission:
            if self._closed:
                raise Closed("this LLM is closed")
            if self._thread is None:
                self._thread = CoordinatorThread(
                    lambda: self._try_turn(self._drive, patient=True),
                    lambda: self.has_work,
                    self._errors.append,
                    self._give_up,
                )
                self._thread.start()
                atexit.register(self.stop)  # else it would be cut off in the middle of a turn

    def stop(self) -> None:
        """Let the thread end after its turn, and wait for that; those who wait drive again then.

        Raises:
          RuntimeError: the caller is a callback of a turn.
        """
        self.refuse_within_turn()
        if (thread := self._thread) is None:
            return
        try:
            thread.stop()
        finally:  # also Ctrl-C while it waits: a last turn of the thread keeps others from driving
            self._thread = None
            atexit.unregister(self.stop)
            self.abort()  # what the thread has not come to
            self._listeners.wake_all()

    def _wake(self) -> None:
        """End the wait of the thread that drives, within a turn or between two. Takes no lock."""
        self._coordinator.wake()
        if (thread := self._thread) is not None:
            thread.wake()

    def _give_up(self, error: BaseException) -> None:
        """Abort every request: no turn gets through, so that they would wait for ever."""
        for entry in self.book.entries:
            for sequence in entry.sequences:
                sequence.error = sequence.error or reason_of(error)
            self.abort_soon(entry.request.id)

    # Turns.

    def step(self) -> None:
        """Drive one turn, or wait for the end of one that another thread drives. Where a thread of
        the session's own drives and there is no work, there is nothing to wait for.

        Raises:
          BaseException: what a callback has raised, once; its own request was aborted.
          Closed: the session has been closed.
        """
        if self._closed:
            raise Closed("this LLM is closed")
        listener, before = Listener(wants_turns=True), self._turns
        with self._listeners.waiting(listener):
            while self._turns == before and (self._thread is None or self.has_work):
                self._advance(listener)
        if self._errors:
            raise self._errors.popleft()

    def wait_for(
        self, entries: Iterable[Entry], listener: Listener, show: Callable[[int], object]
    ) -> None:
        """Drive turns, or wait while another thread does, until all `entries` of a listener have
        their answers.

        Args:
          show: called with the number of further answers, each time that some have come.

        Raises:
          RuntimeError: the caller is a callback of a turn.
        """
        todo = set(entries)
        with self._listeners.waiting(listener):
            while todo:
                done = 0
                while listener.finished:
                    entry = listener.finished.popleft()
                    done += entry in todo
                    todo.discard(entry)
                if done:
                    show(done)
                elif todo:
                    self._advance(listener)

    def wait_for_news(self, entry: Entry) -> None:
        """Drive or wait, likewise, until a stream's entry has events or is closed. Raises what
        `wait_for` does."""
        assert entry.listener is not None and entry.events is not None, "no stream's"
        with self._listeners.waiting(entry.listener):
            while not entry.events and not entry.closed:
                self._advance(entry.listener)

    def close(self) -> None:
        """Abort every request that has not ended, and drive until the engines have nothing in
        flight. Nothing is served afterwards; a second call does nothing.

        Raises:
          RuntimeError: the caller is a callback of a turn; nothing has been closed then.
        """
        self.refuse_within_turn()
        with self._admission:
            self._closed = True
        self.stop()
        listener = Listener(wants_turns=True)
        with self._listeners.waiting(listener):
            for entry in self.book.entries:
                self.abort_soon(entry.request.id)
            while self.has_work:
                self._advance(listener)
        self.book.clear_answers()

    def refuse_within_turn(self) -> None:
        """Refuse a call that would wait for the turn from which it is made.

        Raises:
          RuntimeError: the caller is a callback of a turn.
        """
        if self._driver == threading.get_ident():
            raise RuntimeError(
                "on_text: called within a turn of this LLM, so that it cannot wait for another; "
                "submit instead"
            )

    # Inside.

    def _advance(self, listener: Listener) -> None:
        """Drive one turn, or wait until something has come for the listener or no thread drives.
        Where the session has a thread of its own, only wait.

        Raises:
          RuntimeError: the caller is a callback of a turn, which would wait for itself.
        """
        self.refuse_within_turn()
        if self._thread is None:
            with held_interrupts():
                try:
                    mine = self._try_turn(self._drive)
                finally:
                    self._carry_out_noted()
                if mine:
                    return
        listener.event.wait()
        listener.event.clear()

    def _try_turn(self, call: Callable[[], None], *, patient: bool = False) -> bool:
        """Call it as the thread that drives; returns whether no other thread was driving. A patient
        caller waits until none is."""
        mine = False
        try:
            mine = self._turn.acquire(blocking=patient)
            if mine:
                self._driver, self._broken_off = threading.get_ident(), None
                call()
                if self._broken_off is not None:
                    raise self._broken_off
        finally:
            if mine:
                self._driver = None
                self._turn.release()
                for call in list(self.after_turns):
                    call()
        return mine

    def _drive(self) -> None:
        """One turn."""
        try:
            self._take_inbox()
            if self._coordinator.has_work:  # else it would wait for what never comes
                self.book.publish(self._coordinator.step())
        except BaseException:
            self.book.publish(self._coordinator.take_news())
            self.book.sweep()
            raise
        finally:
            self._turns += 1
            self._listeners.turn_ended()

    def _attend(self) -> None:
        """Carry out what cannot wait for a turn, unless another thread does."""
        if self._thread is None:
            try:
                self._carry_out_noted()
            finally:
                self._listeners.wake_one()  # one that found this thread at work, and sleeps

    def _carry_out_noted(self) -> None:
        """Carry out the aborts and calls that are noted, unless another thread drives: that does so
        when its turn has ended."""
        while (self._inbox.aborts or self._inbox.calls) and self._try_turn(self._take_inbox):
            pass

    def _take_inbox(self) -> None:
        while self._inbox.calls:
            self._inbox.calls.popleft().carry_out()
        self.book.carry_out(self._inbox, self._coordinator)

    def _callback_failed(self, error: BaseException, meant_for_driver: bool) -> None:
        if meant_for_driver:
            self._broken_off = error
        else:
            self._errors.append(error)
