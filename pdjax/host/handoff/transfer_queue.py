"""Transfer jobs under way: what leaves together, how much may be on the way at once, what has come.

Parts of many hand-offs between the same two pools travel in one job, since each job has a cost of
its own, however small it is. What comes back is for those parts alone whose hand-off still wants
them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from pdjax.config import HandoffConfig
from pdjax.core.ids import PoolId
from pdjax.host.events import is_ready
from pdjax.host.handoff.handoff import Handoff, Part
from pdjax.host.handoff.transfer import Item, Load, Transfer, nbytes_of, span_bytes
from pdjax.host.runtime import Runtime
from pdjax.interfaces.events import JobArrived, JobRead, JobWritten, TimerDue
from pdjax.interfaces.steps import Exports
from pdjax.interfaces.transport import TransferJob, TransferTicket, Transport

Parts = tuple[Handoff, np.ndarray, slice]
"""Spans of a hand-off, i64[n], in some of its layer groups."""

_PATIENCE_S = 60.0
"""Seconds after which a job that is not wanted is given up, where there is no deadline."""

GIVE_UP = TimerDue("jobs")
"""Tells that `TransferQueue.give_up` is due."""


class CorruptPages(RuntimeError):
    """Pages whose checksum on arrival was not that of the source."""


@dataclass
class TransferQueue:
    """Sends jobs, and writes what has arrived.

    Attributes:
      config: whether pages are checked, and how many bytes may be on the way.
      transport: moves the bytes.
      runtime: events, clock and recorder.
      written: told of each hand-off of which parts have been written.
      failed: told of each hand-off that a job failed for.
      lost: told of each hand-off whose pages have not been written, though they counted as such.
      numbers: ids for jobs.
      blocked: something could not leave the last time, since too much is on the way.
    """

    config: HandoffConfig
    transport: Transport
    runtime: Runtime
    written: Callable[[Handoff], None]
    failed: Callable[[Handoff, BaseException], None]
    lost: Callable[[Handoff, BaseException], None]
    numbers: Iterable[int]
    blocked: bool = field(default=False, init=False)
    bytes_in_flight: int = field(default=0, init=False)
    _sent: dict[int, Transfer] = field(default_factory=dict)
    _writing: dict[int, Transfer] = field(default_factory=dict)
    _looking: bool = False

    def __post_init__(self) -> None:
        self._numbers = iter(self.numbers)
        self._clock, self._recorder = self.runtime.clock, self.runtime.recorder

    @property
    def busy(self) -> bool:
        """Whether anything that is wanted is on its way, or anything is being written."""
        return bool(self._writing) or any(each.wanted for each in list(self._sent.values()))

    def ends_of(self, job_id: int) -> tuple[PoolId, ...]:
        """The pools of a job that is under way; none of any other."""
        transfer = self._sent.get(job_id) or self._writing.get(job_id)
        return () if transfer is None else (transfer.job.source, transfer.job.target)

    # What leaves.

    def send(self, parts: Iterable[Parts]) -> bool:
        """Send as much of `parts` as may be on the way, those of the oldest hand-off first; none
        overtakes another. Returns whether anything left."""
        self.blocked = busy = False
        for items in self._loads(parts):
            items = tuple(item for item in items if item.wanted)
            if not items:
                continue
            if not self._may_leave(items):
                self.blocked = True
                break
            self._send(self._begin(Load.of(items)))
            busy = True
        return busy

    def exports(self, streaming: Seq[tuple[Handoff, int]], groups: int) -> Exports:
        """The jobs that leave as the layer groups of a step are computed: they count as sent from
        now on. `dispatched` has to follow, or `dropped`.

        Args:
          streaming: hand-offs, and the tokens of each that are computed when the step has ended.
          groups: layer groups of the step.
        """
        layers = streaming[0][0].groups
        longest = max(range(groups), key=lambda group: len(layers[group]))
        parts = [
            (handoff, handoff.sendable(computed), slice(longest, longest + 1))
            for handoff, computed in streaming
        ]
        # The same pages in each group. Nothing leaves while something is blocked, or it would
        # overtake.
        loads = [] if self.blocked else [Load.of(items) for items in self._loads(parts)]
        jobs: list[tuple[TransferJob, ...]] = []
        for group in range(groups):
            leaving: list[TransferJob] = []
            for load in loads:
                here = load.in_group(group)
                self.blocked = self.blocked or not self._may_leave(here.items)
                if self.blocked:
                    break
                leaving.append(self._begin(here).job)
            jobs.append(tuple(leaving))
        return tuple(jobs)

    def dispatched(self, tickets: Mapping[int, TransferTicket]) -> None:
        """A step with exports has been dispatched; these are their tickets."""
        for job_id, ticket in tickets.items():
            self._watch(self._sent[job_id], ticket)

    def dropped(self, exports: Exports, error: BaseException) -> None:
        """A step with exports could not be dispatched. Those of its first layer groups may have
        left."""
        for job in (job for group in exports for job in group):
            self.transport.cancel(job.id)
            self._fail(self._forget(job.id).items, error)

    def _loads(self, parts: Iterable[Parts]) -> list[tuple[Item, ...]]:
        """Parts as loads of jobs, the oldest hand-off first."""
        together: dict[tuple[PoolId, PoolId, int, int], list[Parts]] = defaultdict(list)
        for handoff, spans, groups in parts:
            if spans.size:
                key = (*handoff.ends, groups.start, groups.stop)
                together[key].append((handoff, spans, groups))
        loads = [load for alike in together.values() for load in self._cut(alike)]
        return sorted(loads, key=lambda load: load[0].handoff.id)

    def _cut(self, alike: list[Parts]) -> list[tuple[Item, ...]]:
        """Parts between the same pools, cut into loads that keep within the bound of bytes, or are
        as small as jobs are."""
        handoff, _, groups = alike[0]
        bound, each = self.config.max_bytes_in_flight, span_bytes(handoff, groups)
        sizes = handoff.spans_of.buckets
        fitting = [size for size in sizes if bound is None or size * each <= bound]
        most, loads, room = (fitting or sizes[:1])[-1], list[list[Item]](), 0
        for handoff, spans, groups in alike:
            while spans.size:
                if not room:
                    loads.append([])
                    room = most
                here, spans = spans[:room], spans[room:]
                loads[-1].append(Item.of(handoff, here, groups))
                room -= here.size
        return [tuple(load) for load in loads]

    def _may_leave(self, items: tuple[Item, ...]) -> bool:
        """Whether a load keeps within the bound of bytes; one that is larger than the bound travels
        alone."""
        most, on_the_way = self.config.max_bytes_in_flight, self.bytes_in_flight
        return most is None or not on_the_way or on_the_way + nbytes_of(items) <= most

    def _begin(self, load: Load) -> Transfer:
        """A load as a job, which counts as sent."""
        items, first = load.items, load.items[0].handoff
        groups = first.groups[items[0].groups]
        job = TransferJob(
            id=next(self._numbers),
            source=first.source.id,
            target=first.target.id,
            layers=range(groups[0].start, groups[-1].stop),
            source_pages=load.pages,
            pages=load.held,
            checked=self.config.checksums,
        )
        now = self._clock.now()
        for item in items:
            item.mark(Part.SENT)
            if item.handoff.left == -math.inf and item.handoff.engine is not None:
                self._recorder.mark(item.handoff.sequence, "sent")
            item.handoff.left = now
        transfer = Transfer(job, items, nbytes_of(items), now, load.passengers)
        self._sent[job.id] = transfer
        self.bytes_in_flight += transfer.nbytes
        self._recorder.observer.job_sent(job)
        return transfer

    def _send(self, transfer: Transfer) -> None:
        try:
            ticket = self.transport.send(transfer.job)
        except BaseException as error:
            self._fail(self._forget(transfer.job.id).items, error)
        else:
            self._watch(transfer, ticket)

    def _watch(self, transfer: Transfer, ticket: TransferTicket) -> None:
        transfer.ticket, job_id = ticket, transfer.job.id
        self.runtime.events.watch(ticket.read, JobRead(job_id))
        self.runtime.events.watch(ticket, JobArrived(job_id))
        self._look_later()

    @property
    def _patience(self) -> float:
        return self.config.deadline or _PATIENCE_S

    def _look_later(self) -> None:
        if not self._looking:
            self._looking = True
            self.runtime.events.at(self._clock.now() + self._patience, GIVE_UP)

    def _forget(self, job_id: int) -> Transfer:
        """A job is not on its way any more."""
        transfer = self._sent.pop(job_id)
        self.bytes_in_flight -= transfer.nbytes
        return transfer

    def abandon(self) -> None:
        """Forget every job: a turn was broken off, and what is known of them may be wrong."""
        for job_id in (*self._sent, *self._writing):
            with suppress(Exception):
                self.transport.cancel(job_id)

    def pool_lost(self, pool: PoolId) -> None:
        """What a pool kept is gone, and every sequence that relied on it has been preempted. A
        write that has not come back concerns none of them any more: an engine works in order, so
        that no token that was computed after the write has been read."""
        for transfer in self._writing.values():
            writing = transfer.writing
            if transfer.job.target == pool and writing is not None and not is_ready(writing):
                transfer.written.clear()

    # What comes.

    def job_read(self, job_id: int) -> None:
        """The pages of a job have been read."""
        transfer = self._sent.get(job_id)
        if transfer is not None:
            transfer.read = self._clock.now()

    def write_ahead(self, handoff: Handoff) -> None:
        """Begin to write what of a hand-off is on its way, before it has arrived. It counts as
        written when it has been."""
        for transfer in list(self._sent.values()):
            mine = any(item.handoff is handoff for item in transfer.items)
            if mine and transfer.writing is None:
                try:
                    self._write(transfer)
                except BaseException as error:
                    self._give_up(self._forget(transfer.job.id), error)

    def job_arrived(self, job_id: int) -> None:
        """A job has arrived, or has failed: begin to write what is still wanted."""
        if job_id not in self._sent:
            return
        transfer = self._forget(job_id)
        self._recorder.observer.job_arrived(transfer.job)
        transfer.arrived = self._clock.now()
        transfer.on_wire = transfer.read or transfer.sent
        if transfer.writing is not None:
            return  # ahead; whether it has come is known when it has been written
        if not transfer.wanted:
            self.transport.cancel(job_id)
            self._recorder.shipment(transfer.shipment(written=None))
            return
        try:
            self._note_way(transfer)
            self._write(transfer)
            if not self.config.checksums:
                self._count(transfer)  # what is dispatched there later will find it
        except BaseException as error:
            self._give_up(transfer, error)

    def _give_up(self, transfer: Transfer, error: BaseException) -> None:
        """A job that is not on its way any more could not be written."""
        self.transport.cancel(transfer.job.id)
        self._recorder.shipment(transfer.shipment(written=None))
        self._fail(transfer.items, error)

    def give_up(self) -> None:
        """Give up jobs that are not wanted and will never come. Such a job takes its room as long
        as it is on the way; unless that has been for very long."""
        self._looking = False
        oldest = self._clock.now() - self._patience
        for job_id, transfer in list(self._sent.items()):
            if transfer.sent <= oldest and not transfer.wanted:
                self._forget(job_id)
                self.transport.cancel(job_id)
        if self._sent:
            self._look_later()

    def job_written(self, job_id: int) -> None:
        """A job has been written, or writing it has failed; see whether all of it came whole."""
        transfer = self._writing.pop(job_id, None)
        if transfer is None:
            return
        self.job_arrived(job_id)  # if it was written ahead, and has not been seen to arrive
        ahead = transfer.cost is None
        self._recorder.observer.job_written(transfer.job)
        now = self._clock.now()
        seconds = now - transfer.arrived
        self._recorder.shipment(transfer.shipment(written=now))
        try:
            assert transfer.writing is not None
            damaged = transfer.writing.result()
            if damaged:
                raise CorruptPages(f"{damaged} pages arrived damaged")
            if ahead:
                self._note_way(transfer)
        except BaseException as error:
            for item in transfer.written:
                if not item.handoff.closed:  # whatever of it has been disowned meanwhile
                    item.handoff.mark(item.spans, item.groups, Part.UNSENT)
                self.lost(item.handoff, error)
            self._fail(transfer.items, error)
            return
        total = sum(item.spans.size for item in transfer.items)
        for item in transfer.items:
            self._recorder.written(item.handoff.sequence, seconds * item.spans.size / total)
        if self.config.checksums or ahead:
            self._count(transfer)

    def _note_way(self, transfer: Transfer) -> None:
        """Take down what a job that has arrived has moved, and how long that took."""
        assert transfer.ticket is not None
        now = transfer.arrived
        cost = transfer.cost = transfer.ticket.result()
        link = self._recorder.link(transfer.job.source, transfer.job.target)
        # The host looks now and then: if it saw both ends of the way at once, the way took at least
        # what so many bytes take.
        seen = now if transfer.read is None else transfer.read
        least = cost.bytes / link.peak if link.peak else 0.0
        transfer.on_wire = max(transfer.sent, min(seen, now - least))
        link.add(cost.bytes, transfer.on_wire, now)

    def _write(self, transfer: Transfer) -> None:
        first = transfer.items[0].handoff
        pages = first.spans_of.pages(
            (
                (item.handoff.target_pages if item.wanted else [], item.spans.tolist())
                for item in transfer.items
            ),
            first.target.layout.page_size,
        )
        transfer.writing = self.transport.write(transfer.job.id, pages)
        self._writing[transfer.job.id] = transfer
        self.runtime.events.watch(transfer.writing, JobWritten(transfer.job.id))

    def _count(self, transfer: Transfer) -> None:
        """The parts of a job are there, and can be relied on."""
        cost = transfer.cost
        assert cost is not None
        self._recorder.transfers.add_shipment(cost)
        total, before = sum(item.spans.size for item in transfer.items), 0
        for item in transfer.items:
            start, before = before, before + item.spans.size
            if not item.wanted:
                continue
            item.mark(Part.WRITTEN)
            transfer.written.append(item)
            # Padding is shared; all parts together are all of the bytes.
            nbytes = cost.bytes * before // total - cost.bytes * start // total
            item.handoff.costs.add_part(cost, nbytes, item.pages)
            transfer.account(item.handoff)
            self.written(item.handoff)

    def _fail(self, items: tuple[Item, ...], error: BaseException) -> None:
        wanted = [item for item in items if item.wanted]
        for item in wanted:
            item.mark(Part.UNSENT)
        for handoff in {item.handoff.id: item.handoff for item in wanted}.values():
            self.failed(handoff, error)
        if not isinstance(error, Exception):
            raise error
