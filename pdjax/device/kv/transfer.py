"""The hand-off: pages from any engine's pool to any other's, by `jax.device_put` of single-device
pieces.

    gather into a few large pieces -> one batched device_put -> re-assembly -> donated scatter

A put that changes the layout of a multi-device array goes through host memory, many times slower,
and blocks; so the gather cuts pieces that lie within one shard on both sides, and each travels
whole from one device to another. What has to change on the way, changes within the programs at
both ends: the size of a page, the type of its elements, see `wire.py`. Everything is asynchronous:
`send` returns before the work that writes the pages has finished. Layers are addressed by their
global index.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from pdjax.core.clock import WallClock
from pdjax.device.compat import all_ready
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.transfer_path import Path, Pieces
from pdjax.interfaces.transfer import End, Shipment, TransferCost, TransferTicket


@dataclass(eq=False)
class ShipmentTicket:
    """A shipment in flight: `pieces` arrive on the target's mesh; `read` is ready when the source
    has been read. `source` is its pool, which may be the reason of a failure."""

    shipment: Shipment
    pieces: Pieces
    read: jax.Array
    cost: TransferCost
    source: PoolOwner

    def gathered(self) -> bool:
        return all_ready(self.read)

    def ready(self) -> bool:
        return all_ready(self.pieces)

    def result(self) -> TransferCost:
        try:
            jax.block_until_ready(self.pieces)
        except Exception:
            self.source.inspect()
            raise
        return self.cost


@dataclass(eq=False)
class LandingTicket:
    """A shipment being written into the pool `target`; `differing` i32[devices] pages that are not
    what left, to look at only if they are `checked`."""

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
            try:
                jax.block_until_ready(self.differing)
            except Exception:
                self.target.inspect()
                raise
            self._result = int(jax.device_get(self.differing).sum()) if self.checked else 0
        return self._result


class DeviceTransfer:
    """Moves pages between any two pools, whatever their layouts; see `interfaces.Transfer`.

    Args:
      pools: of each end; ends whose engines share a pool have the same.
      wire_dtype: what KV is rounded to for the way; None keeps it exact.

    Raises:
      ValueError: two pools that cannot hold the same KV, or no such type.
    """

    def __init__(self, pools: Mapping[End, PoolOwner], wire_dtype: str | None = None) -> None:
        self._pools = dict(pools)
        self._paths = {
            (source, target): Path(self._pools[source], self._pools[target], wire_dtype)
            for source in self._pools
            for target in self._pools
            if not self.shares_pool(source, target)
        }

    def path(self, source: End, target: End) -> Path:
        """The programs between two different pools."""
        return self._paths[source, target]

    def shares_pool(self, source: End, target: End) -> bool:
        return self._pools[source] is self._pools[target]

    def send(self, shipment: Shipment) -> ShipmentTicket:
        path, layers = self.path(shipment.source, shipment.target), shipment.layers
        gathered, read = path.gather(layers, shipment.source_pages, shipment.checked)
        pieces, devices = path.cut(layers, gathered)
        arriving = jax.device_put(pieces, devices)
        cost = TransferCost(
            bytes=sum(piece.nbytes for piece in pieces),
            pages=shipment.pages,
            pieces=len(pieces),
            puts=1,
            layout_changing_puts=sum(len(piece.sharding.device_set) != 1 for piece in pieces),
        )
        assembled = path.assemble(layers, arriving)
        return ShipmentTicket(shipment, assembled, read, cost, path.source)

    def land(self, ticket: TransferTicket, target_pages: np.ndarray) -> LandingTicket:
        assert isinstance(ticket, ShipmentTicket), ticket
        shipment = ticket.shipment
        path = self.path(shipment.source, shipment.target)
        differing = path.scatter(shipment.layers, ticket.pieces, target_pages, shipment.checked)
        return LandingTicket(differing, shipment.checked, path.target)

    def close(self) -> None:
        for path in self._paths.values():
            path.close()

    def _link(self, source: End, target: End) -> tuple[jax.Device, jax.Device]:
        """Two devices between which pieces travel; of different ones, if the meshes have any."""
        layers = range(self._pools[source].layout.num_layers)
        meshes = [self._pools[end].mesh.devices.flat for end in (source, target)]
        links = [
            (meshes[0][hop.source[2]], meshes[1][hop.target[2]])
            for hop in self.path(source, target).plan(layers).hops
        ]
        return next((link for link in links if link[0] is not link[1]), links[0])

    def plain_put(self, source: End, target: End, nbytes: int) -> Callable[[], None]:
        """What a hand-off is held against: a call that puts so many bytes, which are on a device of
        `source` already, on one of `target`, and waits for them."""
        here, there = self._link(source, target)
        payload = jax.block_until_ready(jax.device_put(np.zeros(nbytes, np.uint8), here))

        def put() -> None:
            jax.block_until_ready(jax.device_put(payload, there))

        return put

    def probe(self, source: End, target: End, nbytes: int) -> float:
        put, clock, took = self.plain_put(source, target, nbytes), WallClock(), []
        for _ in range(4):  # the first finds the way
            started = clock.now()
            put()
            took.append(clock.now() - started)
        return min(took[1:])
