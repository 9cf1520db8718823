"""Rotary embedding, and attention over paged KV: the `attend` that both phases hand to the
model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pdjax.device.kv.pool import KVPool, write_tokens
from pdjax.model_spec import ModelSpec

Read = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""q [T, N, H], k_pages and v_pages [K, P, S, H] -> [T, N, H]."""


class PagedAttend:
    """Rotates q and k, writes k and v to their pages, and reads attention back from the pages.

    It lives for one trace of one step. `pool` is replaced layer by layer; take it from here at the
    end.
    """

    def __init__(
        self,
        pool: KVPool,
        spec: ModelSpec,
        positions: jax.Array,
        slot_mapping: jax.Array,
        read: Read,
    ) -> None:
        self.pool = KVPool(k=list(pool.k), v=list(pool.v))
        self._slot_mapping = slot_mapping
        self._read = read
        self._cos, self._sin = rope_table(spec, positions)

    def __call__(self, slot: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k = rotate(q, self._cos, self._sin), rotate(k, self._cos, self._sin)
        self.pool.k[slot] = write_tokens(self.pool.k[slot], k, self._slot_mapping)
        self.pool.v[slot] = write_tokens(self.pool.v[slot], v, self._slot_mapping)
        return self._read(q, self.pool.k[slot], self.pool.v[slot])


def rope_table(spec: ModelSpec, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin f32[T, 1, H/2] of the angles at `positions` i32[T]; bfloat16 could not tell 257
    from 256."""
    frequencies, scale = spec.rope.frequencies(spec.head_dim)
    angles = positions.astype(jnp.float32)[:, None, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [T, heads, H] with dimension i of the first half paired with i of the second, as Hugging
    Face lays it out."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
