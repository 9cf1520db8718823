"""Checksums of KV in transit: they tell whether the KV that arrived equals, bit for bit, what left.

A checksum is the sum, with wrap-around, of each element's bits mixed with its position. The mixing
is invertible at each position, so a change of a single element always changes the sum. Any other
change, such as elements that swap places or a piece of zeros, goes undetected about once in 2**32
times. A checksum is not proof against an adversary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def checksums(arrays: Sequence[jax.Array], spans: int) -> jax.Array:
    """Return u32[spans]: the checksum of each span of tokens over all `arrays`.

    Axis 1 of an array [X, spans * tokens, ...] is cut into `spans` equal spans.
    """
    sums, before = jnp.zeros(spans, jnp.uint32), 0
    for array in arrays:
        sums = sums + _sum(array, spans, before)
        before += array.size // spans
    return sums


def _sum(array: jax.Array, spans: int, first: int) -> jax.Array:
    """Return one array's part of each sum; `first` is the position of its first element."""
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    bits = bits.reshape(array.shape[0], spans, -1)
    row = lax.broadcasted_iota(jnp.uint32, bits.shape, 0)
    column = lax.broadcasted_iota(jnp.uint32, bits.shape, 2)
    place = row * np.uint32(bits.shape[2]) + column + np.uint32(first)
    mixed = bits + place * np.uint32(0x9E3779B1)
    mixed = (mixed ^ mixed >> 16) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ mixed >> 13) * np.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ mixed >> 16, axis=(0, 2), dtype=jnp.uint32)
