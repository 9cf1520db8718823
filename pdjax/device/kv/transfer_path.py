"""A pair of pools, and the programs that move pages from one to the other.

Pieces are what travels: each lies within one shard on both sides, so that it goes whole from one
device to another. It holds the pages of one part of the route (see `transfer_route.py`) and of one
unit of heads, the largest that divides both shardings.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.quantised import Pages
from pdjax.core.kv_layout import NULL_PAGE
from pdjax.device.kv.pool import Layers, PoolOwner, gather_pages, scatter_pages
from pdjax.device.kv.transfer_route import Route
from pdjax.device.kv.wire import Wire
from pdjax.device.mesh import STAGE, TP

PIECE = P((STAGE, TP))
"""What each device of a mesh has for itself is stacked along the first axis."""

Pieces = list[list[jax.Array]]
"""[part of a route][unit of heads within a device], each stacked over the devices of a mesh."""

Gather = Callable[[list[Layers], np.ndarray, bool], tuple[Pieces, jax.Array]]
Scatter = Callable[[list[Layers], Pieces, np.ndarray, bool], tuple[list[Layers], jax.Array]]


@dataclass(frozen=True)
class Hop:
    """The way of one piece: of which device of the source's mesh it is which one, and of which of
    the target's it becomes which one; (part, unit within the device, device)."""

    source: tuple[int, int, int]
    target: tuple[int, int, int]


class Path:
    """The plans of one (source, target) pair, and its compiled gather and scatter."""

    def __init__(self, source: PoolOwner, target: PoolOwner, wire_dtype: str | None) -> None:
        """
        Raises:
          ValueError: KV of one cannot be made that of the other, or no such wire type.
        """
        source.layout.check_same_kv(target.layout)
        self.source, self.target = source, target
        self.wire = Wire.between(source.layout, target.layout, wire_dtype)
        self.route = cache(partial(Route.of, source.layout, target.layout))
        self.hops = cache(lambda layers: tuple(self._hops(self.route(layers))))
        self._unit = source.layout.head_unit(target.layout)  # heads a piece
        self._span = source.layout.span(target.layout)
        self._source_devices = list(source.mesh.devices.flat)
        self._target_devices = list(target.mesh.devices.flat)
        self._nothing = cache(self._make_nothing)
        self._gather = self._make_gather()
        self._scatter = self._make_scatter()

    def gather(
        self, layers: range, page_ids: np.ndarray, checked: bool
    ) -> tuple[Pieces, jax.Array]:
        """Pages i32[n] of the source; and something small that is ready when they are."""
        parts = [self.source.layers(slots) for slots in self.route(layers).source_parts]
        return self._gather(parts, page_ids, checked)

    def cut(self, layers: range, gathered: Pieces) -> tuple[list[jax.Array], list[jax.Device]]:
        """The pieces that the target needs, and where each has to go; in the order of `hops`."""
        on = [[_by_device(array) for array in units] for units in gathered]
        pieces, devices = [], []
        for hop in self.hops(layers):
            part, unit, device = hop.source
            pieces.append(on[part][unit][self._source_devices[device]])
            devices.append(self._target_devices[hop.target[2]])
        return pieces, devices

    def assemble(self, layers: range, arrived: list[jax.Array]) -> Pieces:
        """Pieces in the order of `hops`, as arrays over the target's mesh; nothing is copied.

        A stage that receives nothing for a part gets zeros that are already there.
        """
        found = {hop.target: x for hop, x in zip(self.hops(layers), arrived, strict=True)}
        where = NamedSharding(self.target.mesh, PIECE)
        units = self.target.layout.local_heads // self._unit
        parts: Pieces = []
        for part in range(len(self.route(layers).target_parts)):
            one = next(piece for (other, *_), piece in found.items() if other == part)
            whole = (one.shape[0] * len(self._target_devices), *one.shape[1:])
            parts.append([])
            for unit in range(units):
                shards = [found.get((part, unit, i)) for i, _ in enumerate(self._target_devices)]
                filled = [
                    self._nothing(device, one.shape, one.dtype) if shard is None else shard
                    for device, shard in zip(self._target_devices, shards, strict=True)
                ]
                parts[-1].append(jax.make_array_from_single_device_arrays(whole, where, filled))
        return parts

    def scatter(
        self, layers: range, pieces: Pieces, page_ids: np.ndarray, checked: bool
    ) -> jax.Array:
        """Write pieces into pages i32[m] of the target.

        Returns:
          i32[devices], ready when that is done: pages of each device that are not what left.
        """
        route = self.route(layers)
        shape = len(route.target_parts), self.target.layout.stages, len(page_ids)
        ids = np.full(shape, NULL_PAGE, np.int32)
        for run in route.runs:
            ids[route.target_parts.index(run.target_slots), run.target_stage] = page_ids
        with self.target.donated():
            parts = [self.target.layers(slots) for slots in route.target_parts]
            after, differing = self._scatter(parts, pieces, ids, checked)
            for slots, written in zip(route.target_parts, after, strict=True):
                self.target.replace(slots, written)
        return differing

    def close(self) -> None:
        """Let go of the arrays that are kept between calls."""
        self._nothing.cache_clear()

    def _hops(self, route: Route) -> Iterator[Hop]:
        source, target = self.source.layout, self.target.layout
        for run in route.runs:
            part = route.source_parts.index(run.source_slots)
            target_part = route.target_parts.index(run.target_slots)
            for unit in range(source.kv_heads // self._unit):
                shard, mine = divmod(unit, source.local_heads // self._unit)
                target_shard, theirs = divmod(unit, target.local_heads // self._unit)
                yield Hop(
                    (part, mine, run.source_stage * source.tp + shard),
                    (target_part, theirs, run.target_stage * target.tp + target_shard),
                )

    def _make_nothing(
        self, device: jax.Device, shape: tuple[int, ...], dtype: np.dtype
    ) -> jax.Array:
        return jax.device_put(np.zeros(shape, dtype), device)

    def _make_gather(self) -> Gather:
        """Jitted (source's layers of each part, page ids i32[n], checked STATIC) -> (Pieces, i32[1]
        of each device). By its name `experiments/handoff_trace.py` knows it in a trace."""
        units, unit, wire = self.source.layout.local_heads // self._unit, self._unit, self.wire
        size, span = self.source.layout.page_size, self._span
        mesh, where = self.source.mesh, self.source.sharding

        def local(
            parts: list[Layers], page_ids: jax.Array, *, checked: bool
        ) -> tuple[Pieces, jax.Array]:
            spans = len(page_ids) * size // span

            def piece(layers: Layers, j: int) -> jax.Array:
                x = gather_pages(layers, slice(j * unit, (j + 1) * unit), page_ids)
                return wire.write(x, spans, checked=checked)

            pieces = [[piece(layers, j) for j in range(units)] for layers in parts]
            return pieces, jnp.zeros(1, jnp.int32)

        def gather(
            parts: list[Layers], page_ids: jax.Array, checked: bool
        ) -> tuple[Pieces, jax.Array]:
            return jax.shard_map(
                partial(local, checked=checked),
                mesh=mesh,
                in_specs=(where.spec, P()),
                out_specs=PIECE,
                check_vma=False,
            )(parts, page_ids)

        return jax.jit(gather, static_argnums=2, in_shardings=(where, NamedSharding(mesh, P())))

    def _make_scatter(self) -> Scatter:
        """Jitted (target's layers of each part DONATED, Pieces, page ids i32[parts, R, m], checked
        STATIC) -> (layers of each part, i32[1] of each device: pages that are not what left)."""
        layout, unit, wire = self.target.layout, self._unit, self.wire
        span, mesh, where = self._span, self.target.mesh, self.target.sharding

        def local(
            parts: list[Layers], pieces: Pieces, ids: jax.Array, *, checked: bool
        ) -> tuple[list[Layers], jax.Array]:
            pages = ids.shape[-1]
            tokens = pages * layout.page_size
            spans = tokens // span
            after, differs = [], jnp.zeros(pages, bool)
            for layers, units, own in zip(parts, pieces, ids[:, 0], strict=True):
                sides, rows = 2 * len(layers), []
                for piece in units:
                    shape = sides * unit, tokens, layout.head_dim
                    came, intact = wire.read(piece, shape, spans, checked=checked)
                    rows.append(_paged(came, (sides, unit, pages, layout.page_size)))
                    if intact is not None:
                        differs |= jnp.repeat(~intact, pages // spans) & (own != NULL_PAGE)
                whole = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *rows)
                after.append(scatter_pages(layers, whole, own))
            return after, jnp.sum(differs, dtype=jnp.int32)[None]

        def scatter(
            parts: list[Layers], pieces: Pieces, ids: jax.Array, checked: bool
        ) -> tuple[list[Layers], jax.Array]:
            return jax.shard_map(
                partial(local, checked=checked),
                mesh=mesh,
                in_specs=(where.spec, PIECE, P(None, STAGE)),
                out_specs=(where.spec, PIECE),
                check_vma=False,
            )(parts, pieces, ids)

        return jax.jit(
            scatter,
            static_argnums=3,
            donate_argnums=0,
            in_shardings=(where, NamedSharding(mesh, PIECE), NamedSharding(mesh, P(None, STAGE))),
            out_shardings=(where, NamedSharding(mesh, PIECE)),
        )


def _paged(tokens: Pages, shape: tuple[int, int, int, int]) -> Pages:
    """[X, T, H], scales [X, T] -> [*shape, H], [*shape]."""
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), tokens)


def _by_device(array: jax.Array) -> dict[jax.Device, jax.Array]:
    return {shard.device: shard.data for shard in array.addressable_shards}
