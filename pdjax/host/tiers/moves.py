"""Pages on their way between the pools of engines and tiers, in transfer jobs of a bounded size."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pdjax.core.ids import PoolId
from pdjax.host.handoff.spans import Spans
from pdjax.host.kv.pools import PoolState
from pdjax.host.metrics.observer import Observer
from pdjax.host.runtime import Runtime
from pdjax.interfaces.events import JobArrived, JobWritten, TimerDue
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transport import KeptPage, TransferCost, TransferJob, Transport

GIVE_UP = TimerDue("tiers")
"""Tells that `Moves.give_up` is due."""


class MoveTimeout(RuntimeError):
    """Pages had not arrived when they were due."""


@dataclass(eq=False)
class Move:
    """Pages of all layers that go from one pool to another in one job.

    Attributes:
      job: that carries them.
      source, target: the pools.
      pages: of the source, in the order of their sequences; null pages of padding are not among
        them.
      target_pages: what they become; as many, held by whoever has asked for the move.
      nbytes: of the pages.
      sent: moment at which it left.
      asker: who has asked for it.
      ticket: of the job; `writing`: of its pages, once they are being written.
    """

    job: TransferJob
    source: PoolState
    target: PoolState
    pages: list[KeptPage]
    target_pages: list[int]
    nbytes: int
    sent: float
    asker: Any
    ticket: Ticket[TransferCost] | None = None
    writing: Ticket[int] | None = None

    @property
    def arrived(self) -> Iterator[KeptPage]:
        """The pages as they are in the target."""
        for each, page in zip(self.pages, self.target_pages, strict=True):
            yield each._replace(page=page)


Ended = Callable[[Move, BaseException | None], None]
"""Told of a move that has been written, or of the error that it has ended in."""


@dataclass
class Moves:
    """Sends jobs, and writes what has arrived.

    What is asked of a transport is in order: pages of the source may be given to others as soon as
    their job has been sent, and those of the target as soon as their move is dropped.

    Attributes:
      transport: moves the bytes.
      runtime: events, clock and recorder.
      numbers: ids for jobs.
      spans_of: the spans between two pools.
      bound: most bytes on the way from one pool to another; one move may always be.
      deadline: seconds after which a job that has not arrived is given up; None waits for ever.
      ended: told of each move when it has ended, unless it was dropped.
    """

    transport: Transport
    runtime: Runtime
    numbers: Iterable[int]
    spans_of: Callable[[PoolState, PoolState], Spans]
    bound: int
    deadline: float | None
    ended: Ended
    _moves: dict[int, Move] = field(default_factory=dict)
    _bytes: Counter[tuple[PoolId, PoolId]] = field(default_factory=Counter)
    _looking: bool = False

    def __post_init__(self) -> None:
        self._numbers, self._clock = iter(self.numbers), self.runtime.clock

    @property
    def _observer(self) -> Observer:
        return self.runtime.recorder.observer

    @property
    def under_way(self) -> list[Move]:
        """All that have not ended."""
        return list(self._moves.values())

    def ends_of(self, job_id: int) -> tuple[PoolId, ...]:
        """The pools of a job that is under way; none of any other."""
        move = self._moves.get(job_id)
        return () if move is None else (move.source.id, move.target.id)

    def bytes_between(self, source: PoolState, target: PoolState) -> int:
        """On their way from one pool to another."""
        return self._bytes[source.id, target.id]

    def room(self, source: PoolState, target: PoolState) -> int:
        """Pages that may leave one pool for another now, in however many moves."""
        on_the_way, each = self.bytes_between(source, target), source.layout.page_bytes
        if not on_the_way:
            return max(self.most(source, target), self.bound // each)
        return max(0, self.bound - on_the_way) // each

    def most(self, source: PoolState, target: PoolState) -> int:
        """Pages of the largest move: those of the largest bucket that is within the bound."""
        sizes, each = self.spans_of(source, target).buckets, source.layout.page_bytes
        return max([size for size in sizes if size * each <= self.bound] or sizes[:1])

    def send(
        self,
        source: PoolState,
        target: PoolState,
        pages: Seq[KeptPage],
        target_pages: Seq[int],
        asker: Any,
    ) -> None:
        """Let at most `most` pages leave. What goes wrong at once is an end, too."""
        size, spans = source.layout.page_size, self.spans_of(source, target)
        numbers = [each.page for each in pages]
        job = TransferJob(
            id=next(self._numbers),
            source=source.id,
            target=target.id,
            layers=range(source.layout.num_layers),
            source_pages=spans.pages([(numbers, range(len(numbers)))], size),
            pages=len(numbers),
            contents=tuple(pages),
        )
        nbytes, now = len(numbers) * source.layout.page_bytes, self._clock.now()
        move = Move(job, source, target, list(pages), list(target_pages), nbytes, now, asker)
        self._moves[job.id] = move
        self._bytes[source.id, target.id] += nbytes
        self._observer.job_sent(job)
        try:
            move.ticket = self.transport.send(job)
        except Exception as error:
            self._end(move, error)
            return
        self.runtime.events.watch(move.ticket, JobArrived(job.id))
        self._look_later()

    def job_arrived(self, job_id: int) -> None:
        """A job has arrived, or has failed: begin to write it."""
        move = self._moves.get(job_id)
        if move is None or move.writing is not None:
            return
        assert move.ticket is not None, "it was sent"
        self._observer.job_arrived(move.job)
        size, spans = move.target.layout.page_size, self.spans_of(move.source, move.target)
        pages = spans.pages([(move.target_pages, range(len(move.target_pages)))], size)
        try:
            move.ticket.result()
            move.writing = self.transport.write(job_id, pages)
        except Exception as error:
            self.transport.cancel(job_id)
            self._end(move, error)
            return
        self.runtime.events.watch(move.writing, JobWritten(job_id))

    def job_written(self, job_id: int) -> None:
        """A job has been written, or writing it has failed."""
        move = self._moves.get(job_id)
        if move is None:
            return
        assert move.writing is not None, "it is being written"
        self._observer.job_written(move.job)
        try:
            move.writing.result()
        except Exception as error:
            self._end(move, error)
        else:
            self._end(move, None)

    def drop(self, move: Move) -> None:
        """Forget a move that is not wanted any more; nobody is told of its end."""
        self._forget(move)
        if move.writing is None:
            self.transport.cancel(move.job.id)

    def abandon(self) -> None:
        """Drop every move: a turn was broken off, and what is known of them may be wrong."""
        for move in self.under_way:
            with suppress(Exception):
                self.drop(move)

    def give_up(self) -> None:
        """End the moves that are overdue, now that the timer is due."""
        self._looking = False
        assert self.deadline is not None, "the timer was set for it"
        for move in self.under_way:
            if move.job.id not in self._moves:
                continue  # the end of another one has dropped it
            if move.writing is None and move.sent + self.deadline <= self._clock.now():
                self.transport.cancel(move.job.id)
                self._end(move, MoveTimeout(f"not arrived within {self.deadline} s"))
        if self._moves:
            self._look_later()

    def _look_later(self) -> None:
        if self.deadline is not None and not self._looking:
            self._looking = True
            self.runtime.events.at(self._clock.now() + self.deadline, GIVE_UP)

    def _end(self, move: Move, error: BaseException | None) -> None:
        self._forget(move)
        self.ended(move, error)

    def _forget(self, move: Move) -> None:
        del self._moves[move.job.id]
        self._bytes[move.source.id, move.target.id] -= move.nbytes
