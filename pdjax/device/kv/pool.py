"""KVPool: the arrays that hold pages, and the pure functions that gather and scatter them.

One pair of arrays a layer slot, K and V apart, `[K, P, S, H]`, of a quantised layout with their
scales, zero-initialised (a stray NaN times a zero probability would still poison a row), page 0 the
null page. A pool is donated to every step that writes it and has one owner.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding

from pallas_kernels.page_copy import api as page_copy
from pallas_kernels.quantised import Pages, QuantisedPages, elements_of
from pdjax.core.kv_layout import KVLayout
from pdjax.device.compat import is_sound
from pdjax.device.mesh import Rules, sharding

PAGE_AXES = ("kv_heads",)
"""Logical axes of a layer's pages, [K, P, S, H], and of their scales, [K, P, S]; the axes that are
not named lie whole on each device."""

Layers = list[tuple[Pages, Pages]]
"""K and V of some layer slots, each [K, P, S, H]."""


@struct.dataclass
class KVPool:
    """Pages of all layer slots of a mesh; within `shard_map`, those of one shard."""

    k: list[Pages]  # of [K, P, S, H], one a layer slot
    v: list[Pages]

    @property
    def layers(self) -> Layers:
        """K and V of each layer slot."""
        return list(zip(self.k, self.v, strict=True))

    @classmethod
    def of_layers(cls, layers: Layers) -> "KVPool":
        """The inverse of `layers`."""
        return cls(k=[k for k, _ in layers], v=[v for _, v in layers])


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
        self.sharding = sharding(mesh, rules, PAGE_AXES, stacked=True)  # of each array
        self._make_side = _maker(layout, num_pages, self.sharding)
        # The thread that reads a failed ticket is not always the one that dispatches. A step of one
        # engine may land pages in its own pool between two layer groups, hence the reentrancy.
        self._lock = threading.RLock()
        self._suspected = False
        self.arrays = self._zeros()
        self.losses = 0

    @contextmanager
    def donated(self) -> Iterator[None]:
        """A block that donates the arrays and stores their successors.

        An error or an interrupt between the two leaves deleted arrays behind, on which every later
        step would fail. The pool is made anew then, and the error goes on.
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
        """Make the pool anew, empty, if its arrays are deleted or their computation has failed.
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
        if self.arrays.k and is_sound(self.arrays):
            return
        self.close()  # layers that are left would take the room of their successors
        self.arrays = self._zeros()
        self.losses += 1

    def close(self) -> None:
        """Let go of the device memory; the pool has no pages from now on."""
        self.arrays = KVPool([], [])

    def _zeros(self) -> KVPool:
        slots = range(self.layout.slots)
        return KVPool(k=[self._make_side() for _ in slots], v=[self._make_side() for _ in slots])

    def layers(self, slots: range) -> Layers:
        """K and V of some layer slots."""
        k, v = self.arrays.k, self.arrays.v
        return list(zip(k[slots.start : slots.stop], v[slots.start : slots.stop], strict=True))

    def replace(self, slots: range, layers: Layers) -> None:
        """Keep the successors of `layers(slots)`."""
        k, v = list(self.arrays.k), list(self.arrays.v)
        k[slots.start : slots.stop] = [each for each, _ in layers]
        v[slots.start : slots.stop] = [each for _, each in layers]
        self.arrays = KVPool(k, v)


def _maker(layout: KVLayout, num_pages: int, where: NamedSharding) -> Callable[[], Pages]:
    """Makes K or V of one layer slot, zeros."""
    shape = (layout.stages * layout.kv_heads, num_pages, layout.page_size, layout.head_dim)

    def pages() -> Pages:
        elements = jnp.zeros(shape, layout.dtype)
        if not layout.quantised:
            return elements
        return QuantisedPages(elements, jnp.zeros(shape[:-1], jnp.float32))

    return jax.jit(pages, out_shardings=where)


def gather_pages(layers: Layers, heads: slice, page_ids: jax.Array) -> Pages:
    """K and V of `heads` of `layers` in the pages `page_ids` i32[n] -> one array [layers * 2 *
    heads, n, S, H], with scales [layers * 2 * heads, n, S] if they have any."""
    sides = _sides(layers)
    elements = page_copy.gather([elements_of(side) for side in sides], page_ids, heads=heads)
    scales = _scales(sides)
    if not scales:
        return elements
    return QuantisedPages(elements, page_copy.gather(scales, page_ids, heads=heads)[..., 0])


def scatter_pages(layers: Layers, pages: Pages, page_ids: jax.Array) -> Layers:
    """The inverse of `gather_pages` for all heads of a shard: [layers * 2, K, n, S, H], with scales
    if the layers have any, into `page_ids` i32[n]. What the null page then holds is left open."""
    sides = _sides(layers)
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
    return list(zip(after[::2], after[1::2], strict=True))


def _sides(layers: Layers) -> list[Pages]:
    """K and V of each layer slot, one after another."""
    return [side for layer in layers for side in layer]


def _scales(sides: list[Pages]) -> list[jax.Array]:
    """Those of pages that have any, as pages whose head dim is 1."""
    return [side.scales[..., None] for side in sides if isinstance(side, QuantisedPages)]
