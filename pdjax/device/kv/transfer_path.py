"""A pair of pools, and the programs that move pages from one to the other.

A piece is an array that a put moves from one device to another. It lies within one shard on both
sides. It holds pages of one part of the route (see `transfer_route.py`), of planes that are alike,
and of one unit of heads: the largest number of heads that divides both shardings. A plane that is
whole on every shard goes to every shard of the target.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
from jax.sharding import NamedSharding

from pdjax.core.kv_layout import NULL_PAGE, KVLayout
from pdjax.device.kept.ahead import Call
from pdjax.device.kept.program import KeptProgram
from pdjax.device.kv.pool import PoolOwner, page_specs
from pdjax.device.kv.transfer_programs import (
    PIECE,
    Alike,
    Ends,
    Part,
    PartSpecs,
    Pieces,
    make_gather,
    make_scatter,
)
from pdjax.device.kv.transfer_route import Route
from pdjax.device.kv.wire import Wire


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
    gather: KeptProgram
    scatter: KeptProgram


class Path:
    """The plans of one (source, target) pair, each with its gather and scatter."""

    def __init__(self, source: PoolOwner, target: PoolOwner, wire_dtype: str | None) -> None:
        """
        Raises:
          ValueError: KV of one cannot be made that of the other, or no such wire type.
        """
        source.layout.check_same_kv(target.layout)
        self.source, self.target = source, target
        self.wire = Wire.between(source.layout, target.layout, wire_dtype)
        self._ends = Ends(source.layout, target.layout, self.wire)
        self.plan = cache(self._plan)
        sizes = source.layout.page_size, target.layout.page_size
        if self._ends.span not in sizes:
            raise ValueError(
                f"page_size: the sending pool has {sizes[0]}, the receiving pool {sizes[1]}; one "
                "must divide the other"
            )
        self._source_devices = list(source.mesh.devices.flat)
        self._target_devices = list(target.mesh.devices.flat)
        self._nothing = cache(self._make_nothing)

    def gather(
        self, layers: range, page_ids: np.ndarray, checked: bool
    ) -> tuple[Pieces, jax.Array]:
        """Read pages i32[n] of the source.

        Returns:
          the pieces, and i32[devices], which is ready when the pages have been read.
        """
        plan = self.plan(layers)
        parts = [self.source.layers(slots) for slots in plan.route.source_parts]
        gathered: tuple[Pieces, jax.Array] = plan.gather(parts, page_ids, checked)
        return gathered

    def calls(
        self, layers: range, source_ids: np.ndarray, target_ids: np.ndarray, checked: bool
    ) -> Iterator[Call]:
        """The programs that move pages i32[n] into pages i32[m], with arguments of the same
        shapes; first the one that takes longer to compile."""
        plan = self.plan(layers)
        devices = len(self._target_devices)
        pieces = [
            [
                jax.ShapeDtypeStruct((devices * each.shape[0], *each.shape[1:]), each.dtype)
                for alike in Alike.of(part)
                for each in self._ends.pieces(alike, len(source_ids), checked)
            ]
            for part in _planes(self.target.layout, plan.route.target_parts)
        ]
        taken = [self.target.layers(slots) for slots in plan.route.target_parts]
        yield plan.scatter, (taken, pieces, self._places(plan.route, target_ids), checked)
        sent = [self.source.layers(slots) for slots in plan.route.source_parts]
        yield plan.gather, (sent, source_ids, checked)

    def cut(self, layers: range, gathered: Pieces) -> tuple[list[jax.Array], list[jax.Device]]:
        """List the pieces that the target needs, and the device that each goes to, in the order of
        the hops."""
        on = [[_by_device(array) for array in units] for units in gathered]
        pieces = []
        for hop in self.plan(layers).hops:
            part, unit, device = hop.source
            pieces.append(on[part][unit][self._source_devices[device]])
        return pieces, self.devices(layers)

    def devices(self, layers: range) -> list[jax.Device]:
        """The device that each piece goes to, in the order of the hops."""
        return [self._target_devices[hop.target[2]] for hop in self.plan(layers).hops]

    def contents(self, layers: range, *, at_target: bool) -> Iterator[tuple[Alike, range, slice]]:
        """What each piece holds, in the order of the hops, as an end of one shard counts: planes
        that are alike, the layer slots of their part, and which heads of each plane."""
        plan = self.plan(layers)
        end = self.target if at_target else self.source
        parts = plan.route.target_parts if at_target else plan.route.source_parts
        whole = [
            [
                (alike, slots, slice(i * unit, (i + 1) * unit))
                for alike in Alike.of(planes)
                for unit in (self._ends.unit(alike.plane),)
                for i in range(self._ends.units(alike.plane, end.layout.tp))
            ]
            for slots, planes in zip(parts, _planes(end.layout, parts), strict=True)
        ]
        for hop in plan.hops:
            part, unit, _ = hop.target if at_target else hop.source
            yield whole[part][unit]

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
        route, ids = plan.route, self._places(plan.route, page_ids)
        with self.target.donated():
            parts = [self.target.layers(slots) for slots in route.target_parts]
            after, differing = plan.scatter(parts, pieces, ids, checked)
            for slots, written in zip(route.target_parts, after, strict=True):
                self.target.replace(slots, written)
        return differing

    def _places(self, route: Route, page_ids: np.ndarray) -> np.ndarray:
        """Pages of the target that each part of a route is written to, i32[parts, R, m]."""
        shape = len(route.target_parts), self.target.layout.stages, len(page_ids)
        ids = np.full(shape, NULL_PAGE, np.int32)
        for run in route.runs:
            ids[route.target_parts.index(run.target_slots), run.target_stage] = page_ids
        return ids

    def close(self) -> None:
        """Let go of the arrays that are kept between calls."""
        self._nothing.cache_clear()

    def _plan(self, layers: range) -> Plan:
        source, target = self.source.layout, self.target.layout
        route = Route.of(source, target, layers)
        sent = _planes(source, route.source_parts)
        taken = _planes(target, route.target_parts)
        units = self._ends.units
        counts = [sum(units(alike.plane, target.tp) for alike in Alike.of(part)) for part in taken]
        gather = make_gather(self._ends, self.source.mesh, sent, _specs(sent, self.source))
        scatter = make_scatter(self._ends, self.target.mesh, taken, _specs(taken, self.target))
        return Plan(route, counts, tuple(self._hops(route, sent)), gather, scatter)

    def _hops(self, route: Route, sent: Sequence[Part]) -> Iterator[Hop]:
        ours, theirs = self.source.layout.tp, self.target.layout.tp
        for run in route.runs:
            part = route.source_parts.index(run.source_slots)
            target_part = route.target_parts.index(run.target_slots)
            here = there = 0  # units of the planes before this one
            for plane in (alike.plane for alike in Alike.of(sent[part])):
                own, other = (self._ends.units(plane, tp) for tp in (ours, theirs))
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


def _by_device(array: jax.Array) -> dict[jax.Device, jax.Array]:
    return {shard.device: shard.data for shard in array.addressable_shards}


def _planes(layout: KVLayout, parts: Sequence[range]) -> tuple[Part, ...]:
    """Those of the slots of each part."""
    return tuple(layout.slot_planes[slots.start : slots.stop] for slots in parts)


def _specs(parts: Sequence[Part], pool: PoolOwner) -> PartSpecs:
    return tuple(tuple(page_specs(part, pool.rules)) for part in parts)
