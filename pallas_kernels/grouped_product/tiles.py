"""The grouped product as a loop of plain products, for platforms on which XLA makes of its own one
product that multiplies each row with the matrices of all groups.

The rows of a group are cut into tiles of one size, of which the last may reach into the rows behind
the group. A turn of the loop multiplies a tile with the matrix of its group, and keeps of the
result the rows that are the group's own. There are as many turns as tiles with rows, so that groups
without any cost nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.product.reference import product

LARGEST = 128
"""Rows of a tile, unless there are fewer in all."""


def grouped_product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_product.api.grouped_product`; arguments are already checked."""
    rows, groups = len(x), len(w)
    tile = min(LARGEST, max(1, -(-rows // groups)))
    ends = jnp.cumsum(sizes)  # [E], of each group's rows
    tiles = -(-sizes // tile)  # [E]
    last = jnp.cumsum(tiles)  # [E], of each group's tiles
    offset = ends - sizes - (last - tiles) * tile  # [E], of a tile's rows behind i * tile
    padded = jnp.pad(x, ((0, tile), (0, 0)))
    place = jnp.arange(tile)
    at = partial(lax.dynamic_index_in_dim, keepdims=False)

    def turn(i: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.sum(i >= last)
        start, end = at(offset, group) + i * tile, at(ends, group)
        made = product(lax.dynamic_slice_in_dim(padded, start, tile), at(w, group))
        before = lax.dynamic_slice_in_dim(out, start, tile)
        own = (start + place < end)[:, None]
        return lax.dynamic_update_slice_in_dim(out, jnp.where(own, made, before), start, 0)

    out = jnp.zeros((rows + tile, w.shape[2]), x.dtype)
    return lax.fori_loop(0, last[-1], turn, out)[:rows]
