"""Threads that read and write slots, and tickets of what they were asked."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

ResultT = TypeVar("ResultT")


class DiskBusy(RuntimeError):
    """More was asked of a disk than may be in flight. Nothing of it is done."""


class DiskClosed(RuntimeError):
    """A store was closed before it did what it was asked."""


class DiskTicket(Generic[ResultT]):
    """Work in parts that threads do; see `interfaces.Ticket`.

    Args:
      parts: how many there are.
      outcome: makes the result once all parts are done.
    """

    def __init__(self, parts: int, outcome: Callable[[], ResultT]) -> None:
        self._left, self._outcome = parts, outcome
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._error: BaseException | None = None
        self._result: ResultT | None = None
        if not parts:
            self._end()

    def ready(self) -> bool:
        return self._ended.is_set()

    def result(self) -> ResultT:
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # of a ResultT that may be None itself

    def part_done(self, error: BaseException | None = None) -> None:
        """A part is done, or has failed: then the work has failed when all its parts have ended."""
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            last = not self._left
        if last:
            self._end()

    def _end(self) -> None:
        if self._error is None:
            self._result = self._outcome()
        self._ended.set()


@dataclass(eq=False)
class Part:
    """What one thread does at once.

    Attributes:
      slots: that it reads or writes.
      nbytes: of their payloads.
      first: whether it goes before parts that are not so, if they are of other slots: somebody
        waits for what is read.
      work: does it.
      ticket: of the whole.
    """

    slots: frozenset[int]
    nbytes: int
    first: bool
    work: Callable[[], None]
    ticket: DiskTicket[Any]


class DiskThreads:
    """A few threads, and the parts that wait for them.

    Parts of one slot are done one after the other, in the order in which they were asked. The
    threads are daemons: a process that ends without a `close` stops them wherever they are, which a
    slot file survives.

    Args:
      threads: how many.
      most_bytes: of the payloads that are asked and not done; more are refused while there are any.
    """

    def __init__(self, threads: int, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._waiting: list[Part] = []
        self._busy: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"pdjax disk {number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy_bytes(self) -> int:
        """Bytes of the payloads of parts that are not done."""
        return self._bytes

    def ask(self, parts: Sequence[Part]) -> None:
        """Let parts be done.

        Raises:
          DiskBusy: too much is in flight.
          DiskClosed: there are no threads any more.
        """
        nbytes = sum(part.nbytes for part in parts)
        with self._changed:
            if self._closed:
                raise DiskClosed("the store is closed")
            if self._bytes and self._bytes + nbytes > self._most_bytes:
                raise DiskBusy(
                    f"{self._bytes} bytes are in flight, and {nbytes} more were asked for; "
                    f"at most {self._most_bytes} may be"
                )
            self._bytes += nbytes
            self._waiting.extend(parts)
            self._changed.notify(len(parts))

    def close(self) -> None:
        """End the threads once what they do is done; what waits fails. A second call does
        nothing."""
        with self._changed:
            self._closed = True
            dropped, self._waiting = self._waiting, []
            self._changed.notify_all()
        for part in dropped:
            part.ticket.part_done(DiskClosed("the store was closed before this was done"))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (part := self._next()) is not None:
            error: BaseException | None = None
            try:
                part.work()
            except BaseException as raised:
                error = raised
            with self._changed:
                self._busy -= part.slots
                self._bytes -= part.nbytes
                self._changed.notify_all()
            part.ticket.part_done(error)
            del part, error

    def _next(self) -> Part | None:
        """The next part that may be done, once there is one; None when the threads are to end."""
        with self._changed:
            while not self._closed:
                if (place := self._ready_part()) is not None:
                    part = self._waiting.pop(place)
                    self._busy |= part.slots
                    return part
                self._changed.wait()
            return None

    def _ready_part(self) -> int | None:
        """The place of the first part that reads, else of the first one, of those whose slots no
        part before them has."""
        taken, other = set(self._busy), None
        for place, part in enumerate(self._waiting):
            if taken.isdisjoint(part.slots):
                if part.first:
                    return place
                other = place if other is None else other
            taken |= part.slots
        return other
