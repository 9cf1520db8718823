"""The programs that move pages from a pool to another: the gather at one end, the scatter at the
other."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.sharding import PartitionSpec as P

from pallas_kernels.quantised import Pages, QuantisedPages
from pdjax.core.kv_layout import NULL_PAGE, KVLayout, KVPlane, Planes
from pdjax.device.kept.program import KeptProgram
from pdjax.device.kv.pool import Layers, gather_pages, scatter_pages
from pdjax.device.kv.wire import Wire
from pdjax.device.mesh import STAGE, TP, shardings
from pdjax.device.sharing import shared

PIECE = P((STAGE, TP))
"""Spec of an array that stacks one block of each device of a mesh along its first axis."""

Pieces = list[list[jax.Array]]
"""Arrays by part of a route, then by unit of heads within a device; the units of one `Alike` come
before those of the next. An array stacks one piece of each device of a mesh."""

Part = tuple[Planes, ...]
"""The planes of each layer slot of a part."""

PartSpecs = tuple[tuple[tuple[PartitionSpec, ...], ...], ...]
"""How the pages of each plane of each layer slot of each part lie on a mesh."""


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
class Ends:
    """What the programs between two pools depend on.

    Attributes:
      source, target: layouts of the pools.
      wire: the form of KV between them.
    """

    source: KVLayout
    target: KVLayout
    wire: Wire

    @property
    def span(self) -> int:
        """Tokens of whole pages at both ends."""
        return self.source.span(self.target)

    def unit(self, plane: KVPlane) -> int:
        """Heads a piece."""
        return plane.unit(self.source.tp, self.target.tp)

    def pieces(self, alike: Alike, pages: int, checked: bool) -> list[jax.ShapeDtypeStruct]:
        """Those that a shard of the target receives of planes that are alike, in so many pages of
        the source."""
        plane, layout = alike.plane, self.source
        shape = len(alike.places) * self.unit(plane), pages, layout.page_size, plane.dim
        spans = pages * layout.page_size // self.span
        piece = _piece(self.wire, shape, layout.dtype, layout.quantised, spans, checked)
        return [piece] * self.units(plane, self.target.tp)

    def units(self, plane: KVPlane, tp: int) -> int:
        """Pieces of a plane on one of `tp` shards."""
        return plane.local_heads(tp) // self.unit(plane)


@lru_cache(64)
def _piece(
    wire: Wire, shape: tuple[int, ...], dtype: str, quantised: bool, spans: int, checked: bool
) -> jax.ShapeDtypeStruct:
    """The shape that pages of `shape` have on their way."""
    pages: Any = jax.ShapeDtypeStruct(shape, dtype)
    if quantised:
        pages = QuantisedPages(pages, jax.ShapeDtypeStruct(shape[:-1], jnp.float32))
    piece: jax.ShapeDtypeStruct = jax.eval_shape(
        partial(wire.write, spans=spans, checked=checked), pages
    )
    return piece


@shared
def make_gather(ends: Ends, mesh: Mesh, sent: tuple[Part, ...], specs: PartSpecs) -> KeptProgram:
    """Jitted (source's layers of each part, page ids i32[n], checked STATIC) -> (Pieces, i32[1]
    of each device). `experiments/handoff/trace.py` finds it in a trace by its name, gather."""
    layout, wire, span = ends.source, ends.wire, ends.span

    def local(
        parts: list[Layers], page_ids: jax.Array, *, checked: bool
    ) -> tuple[Pieces, jax.Array]:
        spans = len(page_ids) * layout.page_size // span

        def of_part(layers: Layers, part: Part) -> Iterator[jax.Array]:
            for alike in Alike.of(part):
                unit, sides = ends.unit(alike.plane), alike.taken(layers)
                for j in range(ends.units(alike.plane, layout.tp)):
                    x = gather_pages(sides, slice(j * unit, (j + 1) * unit), page_ids)
                    yield wire.write(x, spans, checked=checked)

        pieces = [list(of_part(*each)) for each in zip(parts, sent, strict=True)]
        return pieces, jnp.zeros(1, jnp.int32)

    def gather(parts: list[Layers], page_ids: jax.Array, checked: bool) -> tuple[Pieces, jax.Array]:
        return jax.shard_map(
            partial(local, checked=checked),
            mesh=mesh,
            in_specs=(_lists(specs), P()),
            out_specs=PIECE,
            check_vma=False,
        )(parts, page_ids)

    jitted = jax.jit(gather, static_argnums=2, in_shardings=shardings(mesh, (_lists(specs), P())))
    return KeptProgram("gather", jitted, mesh, ends, sent, specs, static=1)


@shared
def make_scatter(ends: Ends, mesh: Mesh, taken: tuple[Part, ...], specs: PartSpecs) -> KeptProgram:
    """Jitted (target's layers of each part DONATED, Pieces, page ids i32[parts, R, m], checked
    STATIC) -> (layers of each part, i32[1] of each device: pages whose checksum differs)."""
    layout, wire, span = ends.target, ends.wire, ends.span

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
                unit, sides, rows = ends.unit(alike.plane), alike.taken(layers), []
                for piece in islice(left, ends.units(alike.plane, layout.tp)):
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
            in_specs=(_lists(specs), PIECE, P(None, STAGE)),
            out_specs=(_lists(specs), PIECE),
            check_vma=False,
        )(parts, pieces, ids)

    jitted = jax.jit(
        scatter,
        static_argnums=3,
        donate_argnums=0,
        in_shardings=shardings(mesh, (_lists(specs), PIECE, P(None, STAGE))),
        out_shardings=shardings(mesh, (_lists(specs), PIECE)),
    )
    return KeptProgram("scatter", jitted, mesh, ends, taken, specs, static=1)


def _lists(specs: PartSpecs) -> list[list[tuple[PartitionSpec, ...]]]:
    """As the tree of the arrays has them."""
    return [list(part) for part in specs]


def _paged(tokens: Pages, shape: tuple[int, int, int, int]) -> Pages:
    """[X, T, H], scales [X, T] -> [*shape, H], [*shape]."""
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), tokens)
