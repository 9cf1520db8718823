"""One thread-safe book of requests over a coordinator: what `LLM` is thin on.

Any thread submits and aborts; the inbox takes that down. A thread that waits for an answer drives
the turns of the coordinator. Of several threads one drives; the others sleep until something has
come for them, or until they have to take over. So a session has no thread of its own, and a program
with one thread runs as if there were no session.

    inbox -> coordinator.step -> what is new goes to each request's listener

Ctrl-C never breaks a turn off, and what a callback raises ends its own request alone.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from pdjax.core.interrupts import held_interrupts
from pdjax.core.messages import reason_of
from pdjax.core.outputs import Completion, RequestOutput
from pdjax.core.request import Request
from pdjax.entry import Entry, Inbox, Listener
from pdjax.host.coordinator import Coordinator
from pdjax.host.metrics.recorder import Recorder
from pdjax.host.sequences.lifecycle import Progress
from pdjax.host.sequences.sequence import Sequence

_LOG = logging.getLogger("pdjax")


class Closed(RuntimeError):
    """The session has been closed; nothing is served any more."""


_MOST_ERRORS = 16
"""Errors of callbacks that are kept for `step`; if no step comes, older ones are dropped."""


class Session:
    """The requests of one coordinator; safe from any thread.

    Args:
      coordinator: driven by this session alone.
      recorder: has the metrics of each sequence.
    """

    def __init__(self, coordinator: Coordinator, recorder: Recorder) -> None:
        self._coordinator, self._recorder = coordinator, recorder
        coordinator.on_news = self._publish
        self._turn = threading.Lock()  # held by the thread that drives
        self._driver: int | None = None  # that thread
        self._turns = 0
        self._admission = threading.Lock()
        self._inbox = Inbox()
        self._book: dict[str, Entry] = {}
        self._answers: dict[str, RequestOutput] = {}
        self._listeners: set[Listener] = set()
        self._errors: deque[BaseException] = deque(maxlen=_MOST_ERRORS)  # that `step` has to raise
        self._broken_off: BaseException | None = None  # by a callback: the turn ends with it
        self._closed = False

    # What any thread may call.

    def submit(
        self,
        request: Request,
        prompt: str | None = None,
        *,
        listener: Listener | None = None,
        on_text: Callable[[str], None] | None = None,
        streams: bool = False,
        patient: bool = False,
    ) -> Entry:
        """Put a request into the inbox.

        Args:
          request: its id is in use by no other.
          prompt: its text, where it was text.
          listener, on_text: as in Entry.
          streams: whether pieces are kept for a stream.
          patient: waits in the inbox for room in the queue, instead of being refused.

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
            sequences = self._coordinator.sequences_of(request)
            pieces: deque[tuple[list[int], str]] | None = deque() if streams else None
            entry = Entry(request, prompt, sequences, listener, on_text, pieces)
            self._book[request.id] = entry
            self._inbox.arrivals.append(entry)
        return entry

    def abort(self, *request_ids: str) -> None:
        """End requests wherever they are; at once, unless another thread, or a caller of this one,
        is in the middle of a turn. Then the next turn begins with it. Ctrl-C comes when all of them
        are noted."""
        with held_interrupts():
            for request_id in request_ids:
                self.abort_soon(request_id)
            try:
                self._abort_noted()
            finally:
                self._wake_one()  # it may have found this thread at work, and gone to sleep

    def abort_soon(self, request_id: str) -> None:
        """Note that a request is to be ended. Takes no lock, so that a finaliser may call it
        wherever the collector runs it."""
        self._inbox.aborts.append(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a turn may still bring something."""
        return bool(self._inbox) or self._coordinator.has_work

    def take(self, request_id: str) -> RequestOutput | None:
        """The answer to a request without a listener, handed out once; None while there is none."""
        return self._answers.pop(request_id, None)

    def entry(self, request_id: str) -> Entry | None:
        """A request that has not ended; None for any other."""
        return self._book.get(request_id)

    @property
    def entries(self) -> list[Entry]:
        """The requests that have not ended, oldest first."""
        return list(self._book.values())

    # Turns.

    def step(self) -> None:
        """Drive one turn, or wait for the end of one that another thread drives.

        Raises:
          BaseException: what a callback has raised, once; its own request was aborted.
          Closed: the session has been closed.
        """
        if self._closed:
            raise Closed("this LLM is closed")
        listener, before = Listener(wants_turns=True), self._turns
        with self._listening(listener):
            while self._turns == before:
                self._advance(listener)
        if self._errors:
            raise self._errors.popleft()

    def wait_for(
        self, entries: Iterable[Entry], listener: Listener, show: Callable[[int], object]
    ) -> None:
        """Until all `entries` of a listener have their answers; drives turns, or waits while
        another thread does.

        Args:
          show: told how many more have theirs, each time that some do.
        """
        todo = set(entries)
        with self._listening(listener):
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
        """Until a stream's entry has pieces, or its answer."""
        assert entry.listener is not None and entry.pieces is not None, "no stream's"
        with self._listening(entry.listener):
            while not entry.pieces and entry.answer is None:
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
        listener = Listener(wants_turns=True)
        with self._listening(listener):
            for entry in self.entries:
                self.abort_soon(entry.request.id)
            while self.has_work:
                self._advance(listener)
        self._answers.clear()

    def refuse_within_turn(self) -> None:
        """Refuse a callback what would wait for the turn that calls it.

        Raises:
          RuntimeError: the caller is a callback of a turn.
        """
        if self._driver == threading.get_ident():
            raise RuntimeError(
                "on_text: called within a turn of this LLM, so that it cannot wait for another; "
                "submit instead"
            )

    # Inside.

    @contextmanager
    def _listening(self, listener: Listener) -> Iterator[None]:
        """While a thread waits, it may have to take over; when it ends, another one has to."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)
            self._wake_one()

    def _wake_one(self) -> None:
        """Let a thread that sleeps look whether it has to drive. When it leaves, it wakes the
        next."""
        for listener in list(self._listeners)[:1]:
            listener.event.set()

    def _advance(self, listener: Listener) -> None:
        """Drive one turn, or wait until something has come for the listener or no thread drives.

        Raises:
          RuntimeError: the caller is a callback of a turn, which would wait for itself.
        """
        self.refuse_within_turn()
        with held_interrupts():
            try:
                mine = self._try_turn(self._drive)
            finally:
                self._abort_noted()
            if mine:
                return
        listener.event.wait()
        listener.event.clear()

    def _try_turn(self, call: Callable[[], None]) -> bool:
        """Call it as the thread that drives; returns whether no other thread was driving."""
        mine = False
        try:
            mine = self._turn.acquire(blocking=False)
            if mine:
                self._driver, self._broken_off = threading.get_ident(), None
                call()
                if self._broken_off is not None:
                    raise self._broken_off
        finally:
            if mine:
                self._driver = None
                self._turn.release()
        return mine

    def _drive(self) -> None:
        """One turn."""
        try:
            self._take_inbox()
            self._publish(self._coordinator.step())
        except BaseException:
            self._publish(self._coordinator.take_news())
            self._sweep()
            raise
        finally:
            self._turns += 1
            for listener in list(self._listeners):
                if listener.wants_turns:
                    listener.event.set()

    def _abort_noted(self) -> None:
        """Carry out the aborts that are noted, unless another thread drives: that does so when its
        turn has ended."""
        while self._inbox.aborts and self._try_turn(self._take_inbox):
            pass

    def _take_inbox(self) -> None:
        """Queue what has arrived, as far as there is room, and end what is to be aborted."""
        arrivals, aborts = self._inbox.arrivals, self._inbox.aborts
        # An entry leaves the inbox only when it is queued: an interrupt may come between the two.
        while arrivals and self._coordinator.has_room(len(arrivals[0].sequences)):
            self._enqueue(arrivals[0])
            arrivals.popleft()
        while aborts:
            entry = self._book.get(aborts[0])
            if entry is not None:
                if entry in arrivals:
                    self._enqueue(entry)
                    arrivals.remove(entry)
                self._coordinator.abort(entry.request.id)
                self._publish(self._coordinator.take_news())
                self._finish(entry)
            aborts.popleft()

    def _enqueue(self, entry: Entry) -> None:
        if not entry.ended and not self._coordinator.is_live(entry.request.id):
            self._coordinator.enqueue(entry.sequences)

    def _publish(self, news: list[Progress]) -> None:
        """Tell each request's listener and callback what is new."""
        for progress in news:
            entry = self._book.get(progress.sequence.request.id)
            if entry is None:
                continue
            if progress.sequence is entry.sequences[0]:
                self._tell(entry, progress)
            if progress.finished and entry.ended:
                self._finish(entry)

    def _tell(self, entry: Entry, progress: Progress) -> None:
        """Pass on further tokens and text of a first choice."""
        if entry.on_text is None and entry.pieces is None:
            return
        text = progress.sequence.text.take() if progress.sequence.text is not None else ""
        if entry.pieces is not None:
            entry.pieces.append((progress.token_ids, text))
            if entry.listener is not None:
                entry.listener.event.set()
        elif text and entry.on_text is not None:
            try:
                entry.on_text(text)
            except BaseException as error:
                self._callback_failed(entry, error)

    def _callback_failed(self, entry: Entry, error: BaseException) -> None:
        """End the request whose callback has raised. The turn goes on for all others."""
        entry.on_text = None
        for sequence in entry.sequences:
            sequence.error = f"on_text: {reason_of(error)}"
        self.abort_soon(entry.request.id)
        if entry.is_hit_by(error):
            self._broken_off = error
        else:
            _LOG.warning("%s: its on_text failed", entry.request.id, exc_info=error)
            self._errors.append(error)

    def _sweep(self) -> None:
        """Finish every request that has ended, after a turn that may have lost its news."""
        for entry in self.entries:
            if entry.ended:
                self._finish(entry)

    def _finish(self, entry: Entry) -> None:
        """Give a request its answer. It leaves the book last: an interrupt may come before."""
        if entry.request.id not in self._book:
            return
        if entry.answer is None:
            entry.answer = RequestOutput(
                request_id=entry.request.id,
                prompt=entry.prompt,
                prompt_token_ids=list(entry.request.prompt_token_ids),
                choices=[self._completion(sequence) for sequence in entry.sequences],
            )
        if entry.listener is None:
            self._answers[entry.request.id] = entry.answer
        else:
            entry.listener.finished.append(entry)
            entry.listener.event.set()
        self._book.pop(entry.request.id, None)

    def _completion(self, sequence: Sequence) -> Completion:
        return Completion(
            token_ids=list(sequence.output),
            text=sequence.text.text if sequence.text is not None else "",
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            logprobs=(
                None if sequence.request.params.logprobs is None else list(sequence.logprobs)
            ),
            error=sequence.error,
            metrics=self._recorder.request(sequence),
        )
