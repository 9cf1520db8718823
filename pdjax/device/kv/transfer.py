"""The hand-off: pages from any engine's pool to any other's, by `jax.device_put` of single-device
pieces.

    gather into a few large pieces -> one batched device_put -> re-assembly -> donated scatter

A put that changes the layout of a multi-device array goes through host memory, many times slower,
and blocks; so the gather cuts pieces that lie within one shard on both sides, and each travels
whole from one device to another. What has to change on the way, changes within the programs at
both ends: the size of a page, the type of its elements, see `wire.py`. A large shipment is cut into
a few slices of layers, so that one is on the wire while the next is gathered. Everything is
asynchronous: `send` returns before the work that writes the pages has finished. Layers are
addressed by their global index.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from pdjax.clock import WallClock
from pdjax.device.compat import all_ready
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.transfer_path import Path, Pieces
from pdjax.engine_api import End, Shipment, TransferCost, TransferTicket
from pdjax.kv_layout import split_groups

SLICE_BYTES = 256 << 20
"""Of KV in a slice, at least, where there are several: to dispatch one takes the host as long as a
link of some 300 GB/s takes for half of that."""

MOST_SLICES = 4
"""Beyond, what the first one waits for is little beside what the wire takes."""


@dataclass(eq=False)
class ShipmentTicket:
    """A shipment in flight: `pieces` of each of the `slices` of its layers arrive on the target's
    mesh; `read` is ready when the source has been read."""

    shipment: Shipment
    slices: tuple[range, ...]
    pieces: list[Pieces]
    read: jax.Array
    cost: TransferCost

    def gathered(self) -> bool:
        return all_ready(self.read)

    def ready(self) -> bool:
        return all_ready(self.pieces)

    def result(self) -> TransferCost:
        jax.block_until_ready(self.pieces)
        return self.cost


@dataclass(eq=False)
class LandingTicket:
    """A shipment being written; `differing` i32[devices] pages of each slice that are not what
    left."""

    differing: list[jax.Array]
    _result: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for slice_ in self.differing:
            slice_.copy_to_host_async()

    def ready(self) -> bool:
        return all_ready(self.differing)

    def result(self) -> int:
        if self._result is None:
            self._result = sum(int(slice_.sum()) for slice_ in jax.device_get(self.differing))
        return self._result


class DeviceTransfer:
    """Moves pages between any two pools, whatever their layouts; see `engine_api.Transfer`.

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
        path, slices = self.path(shipment.source, shipment.target), self._slices(shipment)
        sent: list[jax.Array] = []
        arriving = []
        for layers in slices:
            gathered, read = path.gather(layers, shipment.source_pages, shipment.checked)
            pieces, devices = path.cut(layers, gathered)
            arriving.append(jax.device_put(pieces, devices))
            sent += pieces
        cost = TransferCost(
            bytes=sum(piece.nbytes for piece in sent),
            pages=shipment.pages,
            pieces=len(sent),
            puts=len(slices),
            layout_changing_puts=sum(len(piece.sharding.device_set) != 1 for piece in sent),
        )
        return ShipmentTicket(
            shipment, slices, list(map(path.assemble, slices, arriving)), read, cost
        )

    def _slices(self, shipment: Shipment) -> tuple[range, ...]:
        """Its layers, cut into as many runs as pay."""
        layout, layers = self._pools[shipment.source].layout, shipment.layers
        pages = len(shipment.source_pages) * layout.page_bytes  # of all layers
        nbytes = pages * len(layers) // layout.num_layers
        count = min(max(1, nbytes // SLICE_BYTES), MOST_SLICES, len(layers))
        runs = split_groups(len(layers), count)
        return tuple(layers[run.start : run.stop] for run in runs)

    def land(self, ticket: TransferTicket, target_pages: np.ndarray) -> LandingTicket:
        assert isinstance(ticket, ShipmentTicket), ticket
        shipment = ticket.shipment
        path = self.path(shipment.source, shipment.target)
        return LandingTicket(
            [
                path.scatter(layers, pieces, target_pages, shipment.checked)
                for layers, pieces in zip(ticket.slices, ticket.pieces, strict=True)
            ]
        )

    def _link(self, source: End, target: End) -> tuple[jax.Device, jax.Device]:
        """Two devices between which pieces travel; of different ones, if the meshes have any."""
        layers = range(self._pools[source].layout.num_layers)
        meshes = [self._pools[end].mesh.devices.flat for end in (source, target)]
        links = [
            (meshes[0][hop.source[2]], meshes[1][hop.target[2]])
            for hop in self.path(source, target).hops(layers)
        ]
        return next((link for link in links if link[0] is not link[1]), links[0])

    def probe(self, source: End, target: End, nbytes: int) -> float:
        here, there = self._link(source, target)
        payload = jax.block_until_ready(jax.device_put(np.zeros(nbytes, np.uint8), here))
        clock, took = WallClock(), []
        for _ in range(4):  # the first finds the way
            started = clock.now()
            jax.block_until_ready(jax.device_put(payload, there))
            took.append(clock.now() - started)
        return min(took[1:])
