"""The hand-off: pages from a prefill mesh to a decode mesh, by `jax.device_put` of single-device
pieces.

    gather into a few large pieces -> one batched device_put -> re-assembly -> donated scatter

A put that changes the layout of a multi-device array goes through host memory, many times slower,
and blocks; so the gather cuts pieces that lie within one shard on both sides (a run of layers of
one stage, a unit of heads that divides both shardings), and each piece travels whole from one
device to another. Everything is asynchronous: `start` returns before the prefill that writes the
pages has finished. Layers are addressed by their global index.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pdjax.device.compat import all_ready
from pdjax.device.kv.pool import PAGE_AXES, KVPool, PoolOwner, gather_pages, scatter_pages
from pdjax.device.mesh import DECODE_RULES, PREFILL_RULES, STAGE, TP, partition
from pdjax.engine_api import TransferCost, TransferTicket

PIECE = P((STAGE, TP))
"""Pieces are stacked over the devices of a mesh along their first axis, [layers * 2 * heads, n, S,
H] on each."""


PieceKey = tuple[int, int, int]
"""Stage of the target, slot group, and global head unit (`start`), or unit within a source device
(gather)."""


@dataclass
class HandoffTicket:
    """A hand-off in flight. `groups[g][j]` is piece j of every device of the target mesh, for slot
    group g."""

    path: "_Path"
    target_pages: np.ndarray  # i32[n]
    groups: list[list[jax.Array]]
    cost: TransferCost

    def ready(self) -> bool:
        return all_ready(self.groups)

    def result(self) -> TransferCost:
        jax.block_until_ready(self.groups)
        return self.cost


class DeviceTransfer:
    """Moves pages between any prefill pool and any decode pool, whatever their layouts."""

    def __init__(self, sources: Sequence[PoolOwner], targets: Sequence[PoolOwner]) -> None:
        """Plans every pair.

        Raises:
          ValueError: a pair whose pages do not mean the same thing.
        """
        self._pools = (list(sources), list(targets))
        self._paths = {
            (s, t): _Path(source, target)
            for s, source in enumerate(sources)
            for t, target in enumerate(targets)
            if source is not target
        }

    def shares_pool(self, source: int, target: int) -> bool:
        return self._pools[0][source] is self._pools[1][target]

    def start(
        self,
        source: int,
        target: int,
        source_pages: np.ndarray,
        target_pages: np.ndarray,
        pages: int,
    ) -> HandoffTicket:
        return self._paths[source, target].start(source_pages, target_pages, pages)

    def land(self, ticket: TransferTicket) -> None:
        assert isinstance(ticket, HandoffTicket)
        ticket.path.land(ticket)


@dataclass
class _Path:
    """The plan of one (source, target) pair, and its compiled gather and scatter."""

    source: PoolOwner
    target: PoolOwner
    _padding: dict[tuple[jax.Device, tuple[int, ...]], jax.Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        src, dst = self.source.layout, self.target.layout
        src.check_same_pages(dst)
        self.unit = src.head_unit(dst)  # heads a piece
        self.per_source = src.local_heads // self.unit
        self.per_target = dst.local_heads // self.unit
        # Slots that hold a layer on every stage, then those that only the longer stages have.
        full, slots = dst.full_slots, dst.slots
        self.slot_groups = [group for group in (range(full), range(full, slots)) if group]
        self.source_devices = list(self.source.mesh.devices.flat)
        self.target_devices = list(self.target.mesh.devices.flat)
        self._gather = self._make_gather()
        self._scatter = self._make_scatter()

    def layers(self, stage: int, group: range) -> tuple[int, ...]:
        """Global layers that `stage` of the target keeps in the slots of `group`; empty where it
        has none."""
        return self.target.layout.stage_layers[stage][group.start : group.stop]

    def start(
        self, source_pages: np.ndarray, target_pages: np.ndarray, pages: int
    ) -> HandoffTicket:
        stacked = self._gather(self.source.arrays, source_pages)
        keys, pieces, devices = [], [], []
        for (stage, group, j), piece in stacked.items():
            for shard in piece.addressable_shards:
                unit = self.source_devices.index(shard.device) * self.per_source + j
                keys.append((stage, group, unit))
                pieces.append(shard.data)
                devices.append(
                    self.target_devices[stage * self.target.layout.tp + unit // self.per_target]
                )
        arrived = jax.device_put(pieces, devices)
        cost = TransferCost(
            bytes=sum(piece.nbytes for piece in pieces),
            pages=pages,
            pieces=len(pieces),
            puts=1,
            layout_changing_puts=sum(len(piece.sharding.device_set) != 1 for piece in pieces),
        )
        groups = self._assemble(dict(zip(keys, arrived, strict=True)))
        return HandoffTicket(self, target_pages, groups, cost)

    def land(self, ticket: HandoffTicket) -> None:
        self.target.arrays = self._scatter(self.target.arrays, ticket.groups, ticket.target_pages)

    def _assemble(self, arrived: dict[PieceKey, jax.Array]) -> list[list[jax.Array]]:
        """Arrived pieces as arrays over the target mesh, [group][piece of a device], not copied."""
        tp = self.target.layout.tp
        sharding = NamedSharding(self.target.mesh, PIECE)
        groups: list[list[jax.Array]] = []
        for g in range(len(self.slot_groups)):
            shape = arrived[0, g, 0].shape  # the first stage is never short
            whole = (shape[0] * len(self.target_devices), *shape[1:])
            groups.append([])
            for j in range(self.per_target):
                parts = []
                for i, device in enumerate(self.target_devices):
                    stage, shard = divmod(i, tp)
                    piece = arrived.get((stage, g, shard * self.per_target + j))
                    parts.append(self._nothing(device, shape) if piece is None else piece)
                groups[-1].append(jax.make_array_from_single_device_arrays(whole, sharding, parts))
        return groups

    def _nothing(self, device: jax.Device, shape: tuple[int, ...]) -> jax.Array:
        """What a short stage gets for slots it has no layer in: zeros that are already there. They
        never travel."""
        if (device, shape) not in self._padding:
            self._padding[device, shape] = jax.device_put(
                np.zeros(shape, self.source.layout.dtype), device
            )
        return self._padding[device, shape]

    def _make_gather(self) -> Callable[[KVPool, np.ndarray], dict[PieceKey, jax.Array]]:
        """Jitted (source pool, page ids i32[n]) -> {(stage, group, j): pieces j of each source
        device}."""

        def gather(pool: KVPool, page_ids: jax.Array) -> dict[PieceKey, jax.Array]:
            pieces = {}
            for stage in range(self.target.layout.stages):
                for g, group in enumerate(self.slot_groups):
                    layers = self.layers(stage, group)
                    for j in range(self.per_source if layers else 0):
                        heads = slice(j * self.unit, (j + 1) * self.unit)
                        pieces[stage, g, j] = gather_pages(pool, layers, heads, page_ids)
            return pieces

        mesh, pages = self.source.mesh, partition(PREFILL_RULES, PAGE_AXES, stacked=True)
        mapped = jax.shard_map(
            gather, mesh=mesh, in_specs=(pages, P()), out_specs=PIECE, check_vma=False
        )
        return jax.jit(mapped, in_shardings=(NamedSharding(mesh, pages), NamedSharding(mesh, P())))

    def _make_scatter(
        self,
    ) -> Callable[[KVPool, list[list[jax.Array]], np.ndarray], KVPool]:
        """Jitted (target pool DONATED, groups, page ids i32[n]) -> target pool."""

        def scatter(pool: KVPool, groups: list[list[jax.Array]], page_ids: jax.Array) -> KVPool:
            for group, units in zip(self.slot_groups, groups, strict=True):
                rows = [unit.reshape(2 * len(group), self.unit, *unit.shape[1:]) for unit in units]
                pool = scatter_pages(pool, group, jnp.concatenate(rows, axis=1), page_ids)
            return pool

        mesh, pages = self.target.mesh, partition(DECODE_RULES, PAGE_AXES, stacked=True)
        mapped = jax.shard_map(
            scatter, mesh=mesh, in_specs=(pages, PIECE, P()), out_specs=pages, check_vma=False
        )
        where = NamedSharding(mesh, pages)
        return jax.jit(
            mapped,
            donate_argnums=0,
            in_shardings=(where, NamedSharding(mesh, PIECE), NamedSharding(mesh, P())),
            out_shardings=where,
        )
