"""Moves pages between pools on devices and a tier in host memory.

    down: gather into a few large pieces -> one batched device_put to pinned memory -> copy
    up:   copy into fresh pieces -> one batched device_put to the devices -> donated scatter

The gather and the scatter are those of a hand-off (`transfer_path.py`), to and from a mesh of one
device that holds whole pages; see there what pieces are. Pinned memory is where a device copies to
at the speed of its link; the pieces on their way alone are there, not the tier. The CPU's own
memory is read where it is.

One thread copies in host memory, in the order of the calls: what a page is given to later is
written later. It dispatches no program, so that programs start in the order in which the threads of
the engines dispatch them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from pdjax.core.clock import WallClock
from pdjax.core.ids import PoolId
from pdjax.device.compat import all_ready
from pdjax.device.kept.ahead import Ahead
from pdjax.device.kv.host_pool import HostPool
from pdjax.device.kv.pool import KVPool, PoolOwner
from pdjax.device.kv.transfer_path import Path
from pdjax.device.kv.transfer_programs import Pieces
from pdjax.device.kv.transport import ArrivalTicket, ReadTicket, WriteTicket
from pdjax.device.mesh import HOST, PREFILL_RULES, make_mesh
from pdjax.device.worker import DispatchFuture, DispatchWorker, Done
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transport import TransferCost, TransferJob, TransferTicket

_PUTS = 3
"""Puts that a link is measured by, of which the fastest counts."""


class _HostEnd(PoolOwner):
    """A pool in host memory as the end of a path: its layout, on a device of the other end, and no
    arrays."""

    def __init__(self, host: HostPool, device: jax.Device) -> None:
        super().__init__(host.layout, host.num_pages, make_mesh([device], 1, 1), PREFILL_RULES)

    def _zeros(self) -> KVPool:
        return []


class LoadFuture(DispatchFuture[TransferCost]):
    """Pages of the tier on their way to devices: they have been read when its call was made."""

    @property
    def read(self) -> Ticket[None]:
        return _Made(self)


@dataclass(frozen=True, eq=False)
class _Made:
    future: LoadFuture

    def ready(self) -> bool:
        return self.future.made

    def result(self) -> None:
        _ = self.future.ticket


@dataclass(frozen=True, eq=False)
class _Loaded:
    """Pieces that have left host memory."""

    pieces: Pieces
    cost: TransferCost

    def ready(self) -> bool:
        return all_ready(self.pieces)

    def result(self) -> TransferCost:
        jax.block_until_ready(self.pieces)
        return self.cost


class HostTransport:
    """Moves pages between a tier in host memory and pools of the same element type; see
    `interfaces.Transport`. Checksums do not travel along: a job's `checked` has no effect.

    Args:
      pools: by their names; those of another type are not connected.
      host: the tier.
      ahead: compiles what `compile` asks for; None makes one.

    Attributes:
      copier: the thread that makes all copies in the tier's memory.

    Raises:
      ValueError: a pool that cannot hold the same KV.
    """

    def __init__(
        self, pools: Mapping[PoolId, PoolOwner], host: HostPool, ahead: Ahead | None = None
    ) -> None:
        self._host, self._ahead = host, ahead or Ahead()
        self._down: dict[PoolId, Path] = {}
        self._up: dict[PoolId, Path] = {}
        for name, pool in pools.items():
            if pool.layout.dtype == host.layout.dtype:
                end = _HostEnd(host, pool.mesh.devices.flat[0])
                self._down[name] = Path(pool, end, None)
                self._up[name] = Path(end, pool, None)
        self._sent: dict[int, tuple[TransferJob, TransferTicket]] = {}
        self.copier = DispatchWorker()

    def connects(self, source: PoolId, target: PoolId) -> bool:
        down = target == self._host.id and source in self._down
        return down or (source == self._host.id and target in self._up)

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        return False

    def _path(self, source: PoolId, target: PoolId) -> Path:
        if not self.connects(source, target):
            raise ValueError(f"source={source}, target={target}: {self._host.id} must be one")
        return self._down[source] if target == self._host.id else self._up[target]

    def compile(self, job: TransferJob, target_pages: np.ndarray) -> Ticket[None]:
        path, down = self._path(job.source, job.target), job.target == self._host.id
        scatter, gather = path.calls(job.layers, job.source_pages, target_pages, False)
        return self._ahead.compile([gather if down else scatter])

    def send(self, job: TransferJob) -> TransferTicket:
        path = self._path(job.source, job.target)
        if job.id in self._sent:
            raise ValueError(f"job.id={job.id}: a job with this id is in flight")
        ticket: TransferTicket
        if job.target == self._host.id:
            ticket = self._gather(path, job)
        else:
            loading = LoadFuture(partial(self._load, path, job))
            self.copier.give(loading)
            ticket = loading
        self._sent[job.id] = job, ticket
        return ticket

    def write(self, job_id: int, target_pages: np.ndarray) -> Ticket[int]:
        job, ticket = self._sent.pop(job_id, (None, None))
        if job is None:
            raise ValueError(f"job_id={job_id}: must be a job in flight")
        path = self._path(job.source, job.target)
        if isinstance(ticket, ArrivalTicket):
            storing = DispatchFuture(partial(self._store, path, ticket, target_pages))
            self.copier.give(storing)
            return storing
        loaded: Any = ticket
        pieces = loaded.ticket.pieces
        differing = path.scatter(job.layers, pieces, target_pages, False)
        return WriteTicket(differing, False, path.target)

    def cancel(self, job_id: int) -> None:
        self._sent.pop(job_id, None)

    # Down.

    def _gather(self, path: Path, job: TransferJob) -> ArrivalTicket:
        gathered, read = path.gather(job.layers, job.source_pages, False)
        pieces, _ = path.cut(job.layers, gathered)
        arriving = jax.device_put(pieces, [_staging(*piece.devices()) for piece in pieces])
        cost = _cost(job, arriving)
        return ArrivalTicket(job, [arriving], ReadTicket(read, path.source), cost)

    def _store(self, path: Path, sent: ArrivalTicket, pages: np.ndarray) -> Done[int]:
        sent.result()
        contents, size = path.contents(sent.job.layers, at_target=True), self._host.layout.page_size
        for piece, (alike, layers, heads) in zip(sent.pieces[0], contents, strict=True):
            each = heads.stop - heads.start
            shape = len(alike.places), each, len(pages), size, alike.plane.dim
            for (slot, plane), content in zip(
                alike.places, np.asarray(piece).reshape(shape), strict=True
            ):
                self._host.write(layers[slot], plane, heads, pages, content)
        return Done(0)

    # Up.

    def _load(self, path: Path, job: TransferJob) -> _Loaded:
        read, pages = self._host.read, job.source_pages
        pieces = [  # fresh ones: a device may read them at any later time
            np.concatenate([read(layers[slot], i, heads, pages) for slot, i in alike.places])
            for alike, layers, heads in path.contents(job.layers, at_target=False)
        ]
        arriving = jax.device_put(pieces, path.devices(job.layers))
        return _Loaded(path.assemble(job.layers, arriving), _cost(job, arriving))

    # Links.

    def measure(self, source: PoolId, target: PoolId, nbytes: int) -> Ticket[float]:
        path, down = self._path(source, target), target == self._host.id
        device = (path.source if down else path.target).mesh.devices.flat[0]
        future = DispatchFuture(partial(_measure, device, nbytes, down))
        self.copier.give(future)
        return future

    def close(self) -> None:
        self.copier.rest()
        self._ahead.end()
        self._host.close()
        self._sent.clear()
        for path in (*self._down.values(), *self._up.values()):
            path.close()


def _staging(device: jax.Device) -> SingleDeviceSharding:
    """Where pieces of a device lie while they are copied to the tier."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    if device.platform == "cpu" or HOST not in kinds:
        return SingleDeviceSharding(device)
    return SingleDeviceSharding(device, memory_kind=HOST)


def _cost(job: TransferJob, pieces: Sequence[jax.Array]) -> TransferCost:
    return TransferCost(
        bytes=sum(piece.nbytes for piece in pieces),
        pages=job.pages,
        pieces=len(pieces),
        puts=1,
        layout_changing_puts=sum(len(piece.sharding.device_set) != 1 for piece in pieces),
    )


def _measure(device: jax.Device, nbytes: int, down: bool) -> Done[float]:
    """Seconds of a put of so many bytes from a device to where it stages, or from host memory."""
    payload = np.zeros(nbytes, np.uint8)
    there = _staging(device) if down else SingleDeviceSharding(device)
    here = jax.block_until_ready(jax.device_put(payload, device)) if down else payload
    clock, took = WallClock(), []
    for _ in range(1 + _PUTS):  # the first finds the way
        started = clock.now()
        jax.block_until_ready(jax.device_put(here, there))
        took.append(clock.now() - started)
    return Done(min(took[1:]))
