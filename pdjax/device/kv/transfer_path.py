"""A pair of pools, and the programs that move pages from one to the other.

A piece is an array that a put moves from one device to another. It lies within one shard on both
sides. It holds pages of one part of the route (see `transfer_route.py`), of planes that are alike,
and of one unit of heads: the largest number of heads that divides both shardings. A plane that is
whole on every shard goes to every shard of the target.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.quantised import Pages
from pdjax.core.kv_layout import NULL_PAGE, KVPlane, Planes
from pdjax.device.kv.pool import Layers, PoolOwner, gather_pages, page_specs, scatter_pages
from pdjax.device.kv.transfer_route import Route
from pdjax.device.kv.wire import Wire
from pdjax.device.mesh import STAGE, TP, shardings

PIECE = P((STAGE, TP))
"""Spec of an array that stacks one block of each device of a mesh along its first axis."""

Pieces = list[list[jax.Array]]
"""Arrays by part of a route, then by unit of heads within a device; the units of one `Alike` come
before those of the next. An array stacks one piece of each device of a mesh."""

Part = tuple[Planes, ...]
"""The planes of each layer slot of a part."""

Gather = Callable[[list[Layers], np.ndarray, bool], tuple[Pieces, jax.Array]]
Scatter = Callable[[list[Layers], Pieces, np.ndarray, bool], tuple[list[Layers], jax.Array]]


@dataclass(frozen=True)
class Alike:
    """Planes of a part that differ in their names only, and so travel together.

    Attributes:
      plane: one of them.
      places: of each, the layer slot within the part, and which plane of the layer it is.
    """

    plane: KVPlane
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, part: Part) -> "list[Alike]":
        """All planes of a part; K and V of equal heads are one."""
        found: dict[KVPlane, list[tuple[int, int]]] = {}
        for slot, planes in enumerate(part):
            for i, plane in enumerate(planes):
                found.setdefault(replace(plane, name=""), []).append((slot, i))
        return [cls(plane, tuple(places)) for plane, places in found.items()]

    def taken(self, layers: Layers) -> list[Pages]:
        """Their pages."""
        return [layers[slot][i] for slot, i in self.places]


@dataclass(frozen=True)
class Hop:
    """Where one piece comes from and where it goes, each as (part, unit within the device, index of
    the device in its mesh)."""

    source: tuple[int, int, int]
    target: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Plan:
    """How some layers travel.

    Attributes:
      route: the runs of these layers.
      units: pieces of each part that a device of the target receives.
      hops: one a piece, in the order in which they are put.
      gather, scatter: programs, shared with layers whose parts are alike.
    """

    route: Route
    units: list[int]
    hops: tuple[Hop, ...]
    gather: Gather
    scatter: Scatter


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
        self.plan = cache(self._plan)
        self._span = source.layout.span(target.layout)
        sizes = source.layout.page_size, target.layout.page_size
        if self._span not in sizes:
            raise ValueError(
                f"page_size: the sending pool has {sizes[0]}, the receiving pool {sizes[1]}; one "
                "must divide the other"
            )
        self._source_devices = list(source.mesh.devices.flat)
        self._target_devices = list(target.mesh.devices.flat)
        self._nothing = cache(self._make_nothing)
        self._gather = cache(self._make_gather)
        self._scatter = cache(self._make_scatter)

    def gather(
        self, layers: range, page_ids: np.ndarray, checked: bool
    ) -> tuple[Pieces, jax.Array]:
        """Read pages i32[n] of the source.

        Returns:
          the pieces, and i32[devices], which is ready when the pages have been read.
        """
        plan = self.plan(layers)
        parts = [self.source.layers(slots) for slots in plan.route.source_parts]
        return plan.gather(parts, page_ids, checked)

    def cut(self, layers: range, gathered: Pieces) -> tuple[list[jax.Array], list[jax.Device]]:
        """List the pieces that the target needs, and the device that each goes to, in the order of
        the hops."""
        on = [[_by_device(array) for array in units] for units in gathered]
        pieces, devices = [], []
        for hop in self.plan(layers).hops:
            part, unit, device = hop.source
            pieces.append(on[part][unit][self._source_devices[device]])
            devices.append(self._target_devices[hop.target[2]])
        return pieces, devices

    def assemble(self, layers: range, arrived: list[jax.Array]) -> Pieces:
        """Join pieces, in the order of the hops, to arrays over the target's mesh, without a copy.

        A stage that receives nothing of a part gets zeros, which its devices hold already.
        """
        plan = self.plan(layers)
        found = {hop.target: x for hop, x in zip(plan.hops, arrived, strict=True)}
        where = NamedSharding(self.target.mesh, PIECE)
        parts: Pieces = []
        for part, units in enumerate(plan.units):
            parts.append([])
            for unit in range(units):
                shards = [found.get((part, unit, i)) for i, _ in enumerate(self._target_devices)]
                one = next(shard for shard in shards if shard is not None)
                whole = (one.shape[0] * len(shards), *one.shape[1:])
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
          i32[devices], ready when that is done: pages of each device whose checksum is not the
          source's.
        """
        plan = self.plan(layers)
        route = plan.route
        shape = len(route.target_parts), self.target.layout.stages, len(page_ids)
        ids = np.full(shape, NULL_PAGE, np.int32)
        for run in route.runs:
            ids[route.target_parts.index(run.target_slots), run.target_stage] = page_ids
        with self.target.donated():
            parts = [self.target.layers(slots) for slots in route.target_parts]
            after, differing = plan.scatter(parts, pieces, ids, checked)
            for slots, written in zip(route.target_parts, after, strict=True):
                self.target.replace(slots, written)
        return differing

    def close(self) -> None:
        """Let go of the arrays that are kept between calls."""
        self._nothing.cache_clear()

    def _plan(self, layers: range) -> Plan:
        source, target = self.source.layout, self.target.layout
        route = Route.of(source, target, layers)
        sent, taken = (
            tuple(layout.slot_planes[slots.start : slots.stop] for slots in parts)
            for layout, parts in ((source, route.source_parts), (target, route.target_parts))
        )
        units = [sum(self._units(alike.plane, target.tp) for alike in Alike.of(p)) for p in taken]
        hops = tuple(self._hops(route, sent))
        return Plan(route, units, hops, self._gather(sent), self._scatter(taken))

    def _unit(self, plane: KVPlane) -> int:
        """Heads a piece."""
        return plane.unit(self.source.layout.tp, self.target.layout.tp)

    def _units(self, plane: KVPlane, tp: int) -> int:
        """Pieces of a plane on one of `tp` shards."""
        return plane.local_heads(tp) // self._unit(plane)

    def _hops(self, route: Route, sent: Sequence[Part]) -> Iterator[Hop]:
        ours, theirs = self.source.layout.tp, self.target.layout.tp
        for run in route.runs:
            part = route.source_parts.index(run.source_slots)
            target_part = route.target_parts.index(run.target_slots)
            here = there = 0  # units of the planes before this one
            for plane in (alike.plane for alike in Alike.of(sent[part])):
                own, other = self._units(plane, ours), self._units(plane, theirs)
                for unit in range(own * ours if plane.sharded else theirs):
                    if plane.sharded:
                        (shard, mine), (target_shard, its) = divmod(unit, own), divmod(unit, other)
                    else:  # each shard of the target gets the whole, from one of ours
                        shard, mine, target_shard, its = unit % ours, 0, unit, 0
                    yield Hop(
                        (part, here + mine, run.source_stage * ours + shard),
                        (target_part, there + its, run.target_stage * theirs + target_shard),
                    )
                here, there = here + own, there + other

    def _make_nothing(
        self, device: jax.Device, shape: tuple[int, ...], dtype: np.dtype
    ) -> jax.Array:
        return jax.device_put(np.zeros(shape, dtype), device)

    def _make_gather(self, sent: tuple[Part, ...]) -> Gather:
        """Jitted (source's layers of each part, page ids i32[n], checked STATIC) -> (Pieces, i32[1]
        of each device). `experiments/handoff/trace.py` finds it in a trace by its name, gather."""
        layout, wire, span, mesh = self.source.layout, self.wire, self._span, self.source.mesh
        specs = [page_specs(part, self.source.rules) for part in sent]

        def local(
            parts: list[Layers], page_ids: jax.Array, *, checked: bool
        ) -> tuple[Pieces, jax.Array]:
            spans = len(page_ids) * layout.page_size // span

            def of_part(layers: Layers, part: Part) -> Iterator[jax.Array]:
                for alike in Alike.of(part):
                    unit, sides = self._unit(alike.plane), alike.taken(layers)
                    for j in range(self._units(alike.plane, layout.tp)):
                        x = gather_pages(sides, slice(j * unit, (j + 1) * unit), page_ids)
                        yield wire.write(x, spans, checked=checked)

            pieces = [list(of_part(*each)) for each in zip(parts, sent, strict=True)]
            return pieces, jnp.zeros(1, jnp.int32)

        def gather(
            parts: list[Layers], page_ids: jax.Array, checked: bool
        ) -> tuple[Pieces, jax.Array]:
            return jax.shard_map(
                partial(local, checked=checked),
                mesh=mesh,
                in_specs=(specs, P()),
                out_specs=PIECE,
                check_vma=False,
            )(parts, page_ids)

        return jax.jit(gather, static_argnums=2, in_shardings=shardings(mesh, (specs, P())))

    def _make_scatter(self, taken: tuple[Part, ...]) -> Scatter:
        """Jitted (target's layers of each part DONATED, Pieces, page ids i32[parts, R, m], checked
        STATIC) -> (layers of each part, i32[1] of each device: pages whose checksum differs)."""
        layout, wire, span, mesh = self.target.layout, self.wire, self._span, self.target.mesh
        specs = [page_specs(part, self.target.rules) for part in taken]

        def local(
            parts: list[Layers], pieces: Pieces, ids: jax.Array, *, checked: bool
        ) -> tuple[list[Layers], jax.Array]:
            pages = ids.shape[-1]
            tokens = pages * layout.page_size
            spans = tokens // span
            after, differs = [], jnp.zeros(pages, bool)
            for layers, part, units, own in zip(parts, taken, pieces, ids[:, 0], strict=True):
                written, left = [list(planes) for planes in layers], iter(units)
                for alike in Alike.of(part):
                    unit, sides, rows = self._unit(alike.plane), alike.taken(layers), []
                    for piece in islice(left, self._units(alike.plane, layout.tp)):
                        shape = len(sides) * unit, tokens, alike.plane.dim
                        came, intact = wire.read(piece, shape, spans, checked=checked)
                        rows.append(_paged(came, (len(sides), unit, pages, layout.page_size)))
                        if intact is not None:
                            differs |= jnp.repeat(~intact, pages // spans) & (own != NULL_PAGE)
                    whole = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *rows)
                    new = scatter_pages(sides, whole, own)
                    for (slot, i), page in zip(alike.places, new, strict=True):
                        written[slot][i] = page
                after.append([tuple(planes) for planes in written])
            return after, jnp.sum(differs, dtype=jnp.int32)[None]

        def scatter(
            parts: list[Layers], pieces: Pieces, ids: jax.Array, checked: bool
        ) -> tuple[list[Layers], jax.Array]:
            return jax.shard_map(
                partial(local, checked=checked),
                mesh=mesh,
                in_specs=(specs, PIECE, P(None, STAGE)),
                out_specs=(specs, PIECE),
                check_vma=False,
            )(parts, pieces, ids)

        return jax.jit(
            scatter,
            static_argnums=3,
            donate_argnums=0,
            in_shardings=shardings(mesh, (specs, PIECE, P(None, STAGE))),
            out_shardings=shardings(mesh, (specs, PIECE)),
        )


def _paged(tokens: Pages, shape: tuple[int, int, int, int]) -> Pages:
    """[X, T, H], scales [X, T] -> [*shape, H], [*shape]."""
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), tokens)


def _by_device(array: jax.Array) -> dict[jax.Device, jax.Array]:
    return {shard.device: shard.data for shard in array.addressable_shards}
