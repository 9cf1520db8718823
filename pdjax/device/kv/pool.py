"""KVPool: the arrays that hold pages, and the pure functions that gather and scatter them.

One pair of arrays a layer slot, K and V apart, `[K, P, S, H]`, zero-initialised (a stray NaN times
a zero probability would still poison a row), page 0 the null page. A pool is donated to every step
that writes it and has one owner.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from pdjax.device.mesh import Rules, sharding
from pdjax.kv_layout import KVLayout

PAGE_AXES = ("kv_heads", None, None, None)
"""Logical axes of a layer's pages, [K, P, S, H]."""


@struct.dataclass
class KVPool:
    """Pages of all layer slots of a mesh; within `shard_map`, those of one shard."""

    k: list[jax.Array]  # of [K, P, S, H], one a layer slot
    v: list[jax.Array]

    @property
    def layers(self) -> list[tuple[jax.Array, jax.Array]]:
        """K and V of each layer slot."""
        return list(zip(self.k, self.v, strict=True))

    @classmethod
    def of_layers(cls, layers: Sequence[tuple[jax.Array, jax.Array]]) -> "KVPool":
        """The inverse of `layers`."""
        return cls(k=[k for k, _ in layers], v=[v for _, v in layers])


class PoolOwner:
    """The one owner of a pool. Steps take `arrays`, donate them, and leave their successors
    here."""

    def __init__(self, layout: KVLayout, num_pages: int, mesh: Mesh, rules: Rules) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.mesh = mesh
        self.arrays = _zeros(layout, num_pages, mesh, rules)


def _zeros(layout: KVLayout, num_pages: int, mesh: Mesh, rules: Rules) -> KVPool:
    shape = (layout.stages * layout.kv_heads, num_pages, layout.page_size, layout.head_dim)
    where = sharding(mesh, rules, PAGE_AXES, stacked=True)
    make = jax.jit(lambda: jnp.zeros(shape, layout.dtype), out_shardings=where)
    return KVPool(k=[make() for _ in range(layout.slots)], v=[make() for _ in range(layout.slots)])


def gather_pages(
    pool: KVPool, layers: Sequence[int], heads: slice, page_ids: jax.Array
) -> jax.Array:
    """K and V of `heads` of `layers` in the pages `page_ids` i32[n] -> one array [layers * 2 *
    heads, n, S, H]."""
    parts = [side[layer][heads, page_ids] for layer in layers for side in (pool.k, pool.v)]
    return jnp.concatenate(parts)


def scatter_pages(
    pool: KVPool, slots: Sequence[int], piece: jax.Array, page_ids: jax.Array
) -> KVPool:
    """The inverse of `gather_pages` for all heads of a shard: piece [slots * 2, K, n, S, H] into
    `page_ids` i32[n]."""
    k, v = list(pool.k), list(pool.v)
    for i, slot in enumerate(slots):
        k[slot] = k[slot].at[:, page_ids].set(piece[2 * i])
        v[slot] = v[slot].at[:, page_ids].set(piece[2 * i + 1])
    return KVPool(k=k, v=v)
