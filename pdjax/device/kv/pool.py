"""KVPool: the arrays that hold pages, and the pure functions that gather and scatter them.

One array for each plane of each layer slot, `[K, P, S, H]`, of a quantised layout with its scales,
zero-initialised (a stray NaN times a zero probability would still poison a row), page 0 the null
page. A pool is donated to every step that writes it and has one owner.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.page_copy import api as page_copy
from pallas_kernels.quantised import Pages, QuantisedPages, elements_of
from pdjax.core.kv_layout import KVLayout, KVPlane, Planes
from pdjax.device.compat import is_sound
from pdjax.device.mesh import Rules, partition
from pdjax.device.sharing import shared

Layers = list[tuple[Pages, ...]]
"""The planes of some layer slots, each [K, P, S, H]."""

KVPool = Layers
"""Pages of all layer slots of a mesh; within `shard_map`, those of one shard."""


def page_specs(slot_planes: Sequence[Planes], rules: Rules) -> list[tuple[PartitionSpec, ...]]:
    """Return how the pages [K, P, S, H] of each slot's planes, and their scales [K, P, S], lie on a
    mesh. Axes that a spec does not name lie whole on each device."""

    def spec(plane: KVPlane) -> PartitionSpec:
        return partition(rules, ("kv_heads" if plane.sharded else None,), stacked=True)

    return [tuple(spec(plane) for plane in planes) for planes in slot_planes]


class PoolOwner:
    """The one owner of a pool. Steps take `arrays`, or the layers of some slots, donate them, and
    leave their successors here; all of that happens within `donated`.

    Attributes:
      arrays: the pages.
      losses: how often the pages were lost and an empty pool was made in their place.
    """

    def __init__(self, layout: KVLayout, num_pages: int, mesh: Mesh, rules: Rules) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.mesh = mesh
        self.rules = rules
        # The thread that reads a failed ticket is not always the one that dispatches. A program
        # that fails inspects the pool within its own block, hence the reentrancy.
        self._lock = threading.RLock()
        self._suspected = False
        self.arrays = self._zeros()
        self.losses = 0

    @contextmanager
    def donated(self) -> Iterator[None]:
        """A block that donates the arrays and stores their successors.

        An error or an interrupt between the two leaves deleted arrays behind, on which every later
        step would fail. The pool is made again then, and the error goes on.
        """
        try:
            with self._lock:
                try:
                    yield
                except BaseException:
                    self._mend()
                    raise
        finally:
            if self._suspected:  # also since a moment ago, by a thread that found the lock taken
                self.inspect()

    def inspect(self) -> None:
        """Make the pool again, empty, if its arrays are deleted or their computation has failed.
        Waits for the work that writes them, but not for a thread that dispatches a step: that looks
        itself when it has done so."""
        self._suspected = True
        if self._lock.acquire(blocking=False):
            try:
                self._mend()
            finally:
                self._lock.release()

    def _mend(self) -> None:
        self._suspected = False
        if self.arrays and is_sound(self.arrays):
            return
        self.close()  # layers that are left would take the room of their successors
        self.arrays = self._zeros()
        self.losses += 1

    def close(self) -> None:
        """Let go of the device memory; the pool has no pages from now on."""
        self.arrays = []

    def _zeros(self) -> KVPool:
        return [tuple(self._pages(plane) for plane in planes) for planes in self.layout.slot_planes]

    def _pages(self, plane: KVPlane) -> Pages:
        """The pages of a plane of one layer slot, zeros."""
        return self._zero_pages(plane)()

    def _zero_pages(self, plane: KVPlane) -> Callable[[], Pages]:
        """What makes them."""
        layout = self.layout
        shape = (layout.stages * plane.heads, self.num_pages, layout.page_size, plane.dim)
        [[spec]] = page_specs([(plane,)], self.rules)
        where = NamedSharding(self.mesh, spec)
        return _zero_pages(shape, layout.dtype, layout.quantised, where)

    def layers(self, slots: range) -> Layers:
        """The planes of some layer slots."""
        return self.arrays[slots.start : slots.stop]

    def replace(self, slots: range, layers: Layers) -> None:
        """Keep the successors of `layers(slots)`."""
        arrays = list(self.arrays)
        arrays[slots.start : slots.stop] = layers
        self.arrays = arrays


@shared
def _zero_pages(
    shape: tuple[int, ...], dtype: str, quantised: bool, where: NamedSharding
) -> Callable[[], Pages]:
    """Makes pages of zeros [K, P, S, H], with scales if they are quantised."""

    def pages() -> Pages:
        elements = jnp.zeros(shape, dtype)
        return (
            QuantisedPages(elements, jnp.zeros(shape[:-1], jnp.float32)) if quantised else elements
        )

    return jax.jit(pages, out_shardings=where)


def gather_pages(sides: Sequence[Pages], heads: slice, page_ids: jax.Array) -> Pages:
    """Gather `heads` of planes that are alike, in the pages `page_ids` i32[n], into one array
    [sides * heads, n, S, H], with scales [sides * heads, n, S] if they have any."""
    elements = page_copy.gather([elements_of(side) for side in sides], page_ids, heads=heads)
    scales = _scales(sides)
    if not scales:
        return elements
    return QuantisedPages(elements, page_copy.gather(scales, page_ids, heads=heads)[..., 0])


def scatter_pages(sides: Sequence[Pages], pages: Pages, page_ids: jax.Array) -> Sequence[Pages]:
    """Scatter all heads of a shard, [sides, K, n, S, H], with scales if the planes have any, into
    `page_ids` i32[n]: the inverse of `gather_pages`. What the null page then holds is left open."""
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pages)
    after: Sequence[Pages] = page_copy.scatter(
        [elements_of(side) for side in sides], elements_of(rows), page_ids
    )
    if isinstance(rows, QuantisedPages):
        scales = page_copy.scatter(_scales(sides), rows.scales[..., None], page_ids)
        after = [
            QuantisedPages(elements, scale[..., 0])
            for elements, scale in zip(after, scales, strict=True)
        ]
    return after


def _scales(sides: Sequence[Pages]) -> list[jax.Array]:
    """Those of pages that have any, as pages whose head dim is 1."""
    return [side.scales[..., None] for side in sides if isinstance(side, QuantisedPages)]
