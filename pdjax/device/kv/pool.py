"""KVPool: the arrays that hold pages, and the pure functions that gather and scatter them.

One pair of arrays a layer slot, K and V apart, `[K, P, S, H]`, zero-initialised (a stray NaN times
a zero probability would still poison a row), page 0 the null page. A pool is donated to every step
that writes it and has one owner.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding

from pallas_kernels.page_copy import api as page_copy
from pdjax.device.mesh import Rules, sharding
from pdjax.kv_layout import KVLayout

PAGE_AXES = ("kv_heads", None, None, None)
"""Logical axes of a layer's pages, [K, P, S, H]."""

Layers = list[tuple[jax.Array, jax.Array]]
"""K and V of some layer slots, each [K, P, S, H]."""


@struct.dataclass
class KVPool:
    """Pages of all layer slots of a mesh; within `shard_map`, those of one shard."""

    k: list[jax.Array]  # of [K, P, S, H], one a layer slot
    v: list[jax.Array]

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
    leave their successors here."""

    def __init__(self, layout: KVLayout, num_pages: int, mesh: Mesh, rules: Rules) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.mesh = mesh
        self.sharding = sharding(mesh, rules, PAGE_AXES, stacked=True)  # of each array
        self.arrays = _zeros(layout, num_pages, self.sharding)

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


def _zeros(layout: KVLayout, num_pages: int, where: NamedSharding) -> KVPool:
    shape = (layout.stages * layout.kv_heads, num_pages, layout.page_size, layout.head_dim)
    make = jax.jit(lambda: jnp.zeros(shape, layout.dtype), out_shardings=where)
    return KVPool(k=[make() for _ in range(layout.slots)], v=[make() for _ in range(layout.slots)])


def gather_pages(layers: Layers, heads: slice, page_ids: jax.Array) -> jax.Array:
    """K and V of `heads` of `layers` in the pages `page_ids` i32[n] -> one array [layers * 2 *
    heads, n, S, H]."""
    return page_copy.gather(_sides(layers), page_ids, heads=heads)


def scatter_pages(layers: Layers, pages: jax.Array, page_ids: jax.Array) -> Layers:
    """The inverse of `gather_pages` for all heads of a shard: [layers * 2, K, n, S, H] into
    `page_ids` i32[n]. What the null page then holds is left open."""
    after = page_copy.scatter(_sides(layers), pages.reshape(-1, *pages.shape[2:]), page_ids)
    return list(zip(after[::2], after[1::2], strict=True))


def _sides(layers: Layers) -> list[jax.Array]:
    """K and V of each layer slot, one after another."""
    return [side for layer in layers for side in layer]
