"""Moves pages from any pool of this process to any other, by `jax.device_put` of single-device
pieces.

    gather into a few large pieces -> one batched device_put -> re-assembly -> donated scatter

A put that changes the layout of a multi-device array goes through host memory, many times slower,
and blocks; so the gather cuts pieces that lie within one shard on both sides, and each travels
whole from one device to another. Where the two pools differ in page size or element type, the
programs at both ends convert; see `wire.py`. Everything is asynchronous: `send` returns before the
work that writes the pages has finished. Layers are addressed by their global index.

Calls that touch one pool are made by one thread at a time, in order: see `transports.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np

from pdjax.core.clock import WallClock
from pdjax.core.ids import PoolId
from pdjax.device.compat import all_ready
from pdjax.device.kept.ahead import Ahead
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.transfer_path import Path
from pdjax.device.kv.transfer_programs import Pieces
from pdjax.device.worker import DispatchFuture, DispatchWorker, Done
from pdjax.interfaces.tickets import Ticket
from pdjax.interfaces.transport import TransferCost, TransferJob

_PUTS = 15
"""Puts that a link is measured by, of which the fastest counts: from the rate follow the layer
groups, and from these the programs to compile. So starts should find the same rate."""


@dataclass(eq=False)
class ReadTicket:
    """Pages that are being read from the pool `source`; `done` is ready when that has ended."""

    done: jax.Array
    source: PoolOwner

    def ready(self) -> bool:
        return all_ready(self.done)

    def result(self) -> None:
        _wait(self.done, self.source)


@dataclass(eq=False)
class ArrivalTicket:
    """A job in flight, whose `pieces` arrive on the target's mesh. If it fails, the source's pool
    may have been lost."""

    job: TransferJob
    pieces: Pieces
    read: ReadTicket
    cost: TransferCost

    def ready(self) -> bool:
        return all_ready(self.pieces)

    def result(self) -> TransferCost:
        _wait(self.pieces, self.read.source)
        return self.cost


@dataclass(eq=False)
class WriteTicket:
    """A job that is being written into the pool `target`. If the job is `checked`, `differing`
    i32[devices] counts pages whose checksum is not the source's."""

    differing: jax.Array
    checked: bool
    target: PoolOwner
    _result: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.checked:
            self.differing.copy_to_host_async()

    def ready(self) -> bool:
        return all_ready(self.differing)

    def result(self) -> int:
        if self._result is None:
            _wait(self.differing, self.target)
            self._result = int(jax.device_get(self.differing).sum()) if self.checked else 0
        return self._result


def _wait(arrays: jax.Array | Pieces, pool: PoolOwner) -> None:
    """Wait for arrays; if their computation has failed, look whether the pool has, too."""
    try:
        jax.block_until_ready(arrays)
    except Exception:
        pool.inspect()
        raise


class DeviceTransport:
    """Moves pages between any two pools, whatever their layouts; see `interfaces.Transport`.

    Args:
      pools: by their names.
      wire_dtype: what KV is rounded to for the way; None keeps it exact.
      ahead: compiles what `compile` asks for; None makes one.

    Raises:
      ValueError: two pools that cannot hold the same KV, or no such type.
    """

    def __init__(
        self,
        pools: Mapping[PoolId, PoolOwner],
        wire_dtype: str | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        self._pools, self._ahead = dict(pools), ahead or Ahead()
        self._paths = {
            (source, target): Path(self._pools[source], self._pools[target], wire_dtype)
            for source in self._pools
            for target in self._pools
            if source != target
        }
        self._in_flight: dict[int, ArrivalTicket] = {}
        self._prober: DispatchWorker | None = None

    def path(self, source: PoolId, target: PoolId) -> Path:
        """The programs between two pools.

        Raises:
          ValueError: there is no such pair.
        """
        path = self._paths.get((source, target))
        if path is None:
            raise ValueError(
                f"source={source}, target={target}: must be two pools of "
                f"{', '.join(map(str, self._pools))}"
            )
        return path

    def connects(self, source: PoolId, target: PoolId) -> bool:
        return (source, target) in self._paths

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        return True

    def compile(self, job: TransferJob, target_pages: np.ndarray) -> Ticket[None]:
        path = self.path(job.source, job.target)
        calls = path.calls(job.layers, job.source_pages, target_pages, job.checked)
        return self._ahead.compile(calls)

    def send(self, job: TransferJob) -> ArrivalTicket:
        path, layers = self.path(job.source, job.target), job.layers
        if job.id in self._in_flight:
            raise ValueError(f"job.id={job.id}: a job with this id is in flight")
        gathered, read = path.gather(layers, job.source_pages, job.checked)
        pieces, devices = path.cut(layers, gathered)
        arriving = jax.device_put(pieces, devices)
        cost = TransferCost(
            bytes=sum(piece.nbytes for piece in pieces),
            pages=job.pages,
            pieces=len(pieces),
            puts=1,
            layout_changing_puts=sum(len(piece.sharding.device_set) != 1 for piece in pieces),
        )
        assembled = path.assemble(layers, arriving)
        ticket = ArrivalTicket(job, assembled, ReadTicket(read, path.source), cost)
        self._in_flight[job.id] = ticket
        return ticket

    def write(self, job_id: int, target_pages: np.ndarray) -> WriteTicket:
        sent = self._in_flight.pop(job_id, None)
        if sent is None:
            raise ValueError(f"job_id={job_id}: must be a job in flight")
        job = sent.job
        path = self.path(job.source, job.target)
        differing = path.scatter(job.layers, sent.pieces, target_pages, job.checked)
        return WriteTicket(differing, job.checked, path.target)

    def cancel(self, job_id: int) -> None:
        self._in_flight.pop(job_id, None)

    def measure(self, source: PoolId, target: PoolId, nbytes: int) -> Ticket[float]:
        self.path(source, target)  # so that this call raises if there is none
        # A thread of its own: the measurement touches no pool, and so needs no turn in a queue.
        if self._prober is None:
            self._prober = DispatchWorker()
        future = DispatchFuture(partial(self._measure, source, target, nbytes))
        self._prober.give(future)
        return future

    def close(self) -> None:
        self._ahead.end()
        self._prober = None
        self._in_flight.clear()
        for path in self._paths.values():
            path.close()

    def _link(self, source: PoolId, target: PoolId) -> tuple[jax.Device, jax.Device]:
        """Two devices between which pieces travel; two different ones if there are such."""
        layers = range(self._pools[source].layout.num_layers)
        meshes = [self._pools[pool].mesh.devices.flat for pool in (source, target)]
        links = [
            (meshes[0][hop.source[2]], meshes[1][hop.target[2]])
            for hop in self.path(source, target).plan(layers).hops
        ]
        return next((link for link in links if link[0] is not link[1]), links[0])

    def plain_put(self, source: PoolId, target: PoolId, nbytes: int) -> Callable[[], None]:
        """Make the call that a hand-off's rate is compared with: it puts so many bytes from a
        device of `source` to one of `target`, and waits for them."""
        here, there = self._link(source, target)
        payload = jax.block_until_ready(jax.device_put(np.zeros(nbytes, np.uint8), here))

        def put() -> None:
            jax.block_until_ready(jax.device_put(payload, there))

        return put

    def _measure(self, source: PoolId, target: PoolId, nbytes: int) -> Done[float]:
        put, clock, took = self.plain_put(source, target, nbytes), WallClock(), []
        for _ in range(1 + _PUTS):  # the first finds the way
            started = clock.now()
            put()
            took.append(clock.now() - started)
        return Done(min(took[1:]))
