"""Moves pages between a tier in host memory and one on a disk.

    down: copy out of the tier in host memory -> write to the slots, with headers and checksums
    up:   read the slots, compare the checksums -> copy into the tier in host memory

What is on its way lies in aligned buffers, which the disk reads and writes as they are. The thread
that makes all other copies in host memory makes these, too, in the order of the calls. Page p of
the tier lies in slot p - 1: there is no null page on the disk.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from pdjax.core.clock import WallClock
from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import NULL_PAGE, KVLayout
from pdjax.device.worker import DispatchFuture, DispatchWorker, Done
from pdjax.disk.headers import SlotContent
from pdjax.disk.slot_store import SlotStore
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transport import (
    KeptPage,
    LostPages,
    Pool,
    TransferCost,
    TransferJob,
    TransferTicket,
)

_PROBES = 3
"""Reads that the disk is measured by, of which the fastest counts."""


class PageRows(Protocol):
    """A pool in host memory, of which each page is one run of bytes.

    Attributes:
      id: its name.
      layout: of its pages.
      rows: u8[P, layout.page_bytes].
    """

    id: PoolId
    layout: KVLayout
    rows: np.ndarray


def disk_pool(name: PoolId, layout: KVLayout, store: SlotStore) -> Pool:
    """The pool that lies in a store, with what has been found there."""
    kept = tuple(KeptPage(each.key, each.place, 1 + each.slot) for each in store.file.contents())
    return Pool(name, layout, 1 + store.file.geometry.slots, kept)


class _Buffers:
    """Aligned buffers for what is on its way; those that are given back are used again, since the
    system takes long to give memory for the first time.

    Args:
      store: whose slots they are for.
      most_bytes: that are kept for later.
    """

    def __init__(self, store: SlotStore, most_bytes: int) -> None:
        self._store, self._most_bytes = store, most_bytes
        self._lock = threading.Lock()
        self._free: list[np.ndarray] = []

    def take(self, pages: int) -> np.ndarray:
        """u8[at least pages, stride]."""
        with self._lock:
            for place, each in enumerate(self._free):
                if len(each) >= pages:
                    return self._free.pop(place)
        return self._store.buffers(pages)

    def give_back(self, rows: np.ndarray) -> None:
        """Nobody looks at what `take` gave any more."""
        with self._lock:
            if rows.nbytes + sum(each.nbytes for each in self._free) <= self._most_bytes:
                self._free.append(rows)
                self._free.sort(key=len)


@dataclass(eq=False)
class _Sent:
    """A job in flight: ready when its pages lie in `rows` u8[pages or more, stride].

    Attributes:
      job: what moves.
      rows: a buffer.
      arrival: of the copy, or of what has been read: whether each page is right.
      cost: of the job.
    """

    job: TransferJob
    rows: np.ndarray
    arrival: Ticket[Any]
    cost: TransferCost

    @property
    def read(self) -> Ticket[None]:
        return self.arrival

    def ready(self) -> bool:
        return self.arrival.ready()

    def result(self) -> TransferCost:
        came = self.arrival.result()
        if came is not None and not all(came):
            pages = zip(self.job.contents, came, strict=True)
            raise LostPages(tuple(each.page for each, here in pages if not here))
        return self.cost


@dataclass(eq=False)
class _Written:
    """A job that is being written; its buffer is free when that has ended."""

    ticket: Ticket[Any]
    end: Callable[[], None]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: bool = False

    def ready(self) -> bool:
        return self.ticket.ready()

    def result(self) -> int:
        try:
            self.ticket.result()
        finally:
            with self._lock:
                if not self._ended:
                    self._ended = True
                    self.end()
        return 0


class DiskTransport:
    """Moves pages between a pool in host memory and a store; see `interfaces.Transport`. A job must
    say what its pages hold, in `contents`. A page that the disk has lost fails the whole job, with
    `LostPages`.

    Args:
      host: the pool in host memory.
      disk: name of the store's pool; see `disk_pool`.
      store: the transport's from now on.
      copier: the thread that copies in host memory.
      most_bytes: of buffers that are kept for later.

    Raises:
      ValueError: the store's pages are not those of the pool.
    """

    def __init__(
        self,
        host: PageRows,
        disk: PoolId,
        store: SlotStore,
        copier: DispatchWorker,
        most_bytes: int = 256 << 20,
    ) -> None:
        if host.layout.page_bytes != store.payload_bytes:
            raise ValueError(
                f"store.payload_bytes={store.payload_bytes}: must be {host.layout.page_bytes}, the "
                f"bytes of a page of {host.id}"
            )
        self._host, self._disk, self._store, self._copier = host, disk, store, copier
        self._buffers = _Buffers(store, most_bytes)
        self._sent: dict[int, _Sent] = {}

    def connects(self, source: PoolId, target: PoolId) -> bool:
        return (source, target) in ((self._host.id, self._disk), (self._disk, self._host.id))

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        return False

    def compile(self, job: TransferJob, target_pages: np.ndarray) -> Ticket[None]:
        return Done(None)

    def send(self, job: TransferJob) -> TransferTicket:
        self._check(job)
        pages = [each.page for each in job.contents]
        rows = self._buffers.take(len(pages))
        arrival: Ticket[Any]
        if job.target == self._disk:
            copying = DispatchFuture(partial(self._copy_out, pages, rows))
            self._copier.give(copying)
            arrival = copying
        else:
            arrival = self._store.read(_slots(job.contents, pages), rows[: len(pages)])
        nbytes = len(pages) * self._store.payload_bytes
        cost = TransferCost(nbytes, len(pages), len(pages), puts=0, layout_changing_puts=0)
        sent = self._sent[job.id] = _Sent(job, rows, arrival, cost)
        return sent

    def _check(self, job: TransferJob) -> None:
        if not self.connects(job.source, job.target):
            raise ValueError(
                f"source={job.source}, target={job.target}: must be {self._host.id} and "
                f"{self._disk}"
            )
        if job.id in self._sent:
            raise ValueError(f"job.id={job.id}: a job with this id is in flight")
        named = [each.page for each in job.contents]
        if named != _not_null(job.source_pages) or len(job.layers) != self._host.layout.num_layers:
            raise ValueError(
                f"job {job.id}: contents say of pages {named} what they hold, and layers are "
                f"{job.layers}; all of {_not_null(job.source_pages)} and all layers must be there"
            )

    def _copy_out(self, pages: list[int], rows: np.ndarray) -> Done[None]:
        for row, page in zip(rows, pages, strict=False):
            row[: self._store.payload_bytes] = self._host.rows[page]
        return Done(None)

    def write(self, job_id: int, target_pages: np.ndarray) -> Ticket[int]:
        sent = self._sent.pop(job_id, None)
        if sent is None:
            raise ValueError(f"job_id={job_id}: must be a job in flight")
        sent.result()
        job, end = sent.job, partial(self._buffers.give_back, sent.rows)
        places = np.flatnonzero(np.asarray(job.source_pages) != NULL_PAGE).tolist()
        to = [int(target_pages[place]) for place in places]
        wanted = [at for at, page in enumerate(to) if page != NULL_PAGE]
        pages = [to[at] for at in wanted]
        if job.target == self._disk:
            contents = _slots([job.contents[at] for at in wanted], pages)
            return _Written(self._store.write(contents, [sent.rows[at] for at in wanted]), end)
        copying = DispatchFuture(partial(self._copy_in, sent.rows, wanted, pages))
        self._copier.give(copying)
        return _Written(copying, end)

    def _copy_in(self, rows: np.ndarray, wanted: list[int], pages: list[int]) -> Done[None]:
        for at, page in zip(wanted, pages, strict=True):
            self._host.rows[page] = rows[at, : self._store.payload_bytes]
        return Done(None)

    def cancel(self, job_id: int) -> None:
        self._sent.pop(job_id, None)

    def measure(self, source: PoolId, target: PoolId, nbytes: int) -> Ticket[float]:
        """See `interfaces.Transport`. Only reads are measured, as a write would need room; it is
        taken to last as long."""
        if not self.connects(source, target):
            raise ValueError(f"source={source}, target={target}: no pools of this transport")
        future = DispatchFuture(partial(self._measure, nbytes))
        DispatchWorker().give(future)
        return future

    def _measure(self, nbytes: int) -> Done[float]:
        geometry, clock, took = self._store.file.geometry, WallClock(), list[float]()
        slots = list(range(min(geometry.slots, max(1, nbytes // geometry.stride))))
        rows = self._store.buffers(len(slots))
        for _ in range(_PROBES):
            started = clock.now()
            self._store.file.get(slots, list(rows))
            took.append(clock.now() - started)
        return Done(min(took) * nbytes / rows.nbytes)

    def close(self) -> None:
        self._copier.rest()
        self._store.close()
        self._sent.clear()


def _slots(contents: Sequence[KeptPage], pages: Sequence[int]) -> list[SlotContent]:
    """The contents of pages, as those of the slots of `pages`."""
    return [
        SlotContent(page - 1, each.key, each.place)
        for each, page in zip(contents, pages, strict=True)
    ]


def _not_null(pages: np.ndarray) -> list[int]:
    return [page for page in pages.tolist() if page != NULL_PAGE]
