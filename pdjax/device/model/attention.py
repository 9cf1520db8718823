"""Attention over paged KV: the `attend` that both phases hand to the model, and the angles of
rotary embedding."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pdjax.device.kv.pool import KVPool
from pdjax.model_spec import ModelSpec

AttendPages = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
"""(qkv [T, K, G + 2, H], scale f32[T], bias [K, G + 2, H] or None, cos and sin f32[T, H/2], k_pages
and v_pages [K, P, S, H]) -> ([T, N, H], k_pages, v_pages): scales, shifts and rotates q and k,
writes k and v to their pages, and reads attention back from the pages of that layer."""


class PagedAttend:
    """`transformer.Attend` over a pool.

    It lives for one trace of one step. `pool` is replaced layer by layer; take it from here at the
    end.
    """

    def __init__(
        self, pool: KVPool, spec: ModelSpec, positions: jax.Array, attend: AttendPages
    ) -> None:
        self.pool = KVPool(k=list(pool.k), v=list(pool.v))
        self._attend = attend
        self._cos, self._sin = rope_table(spec, positions)

    def __call__(
        self, slot: int, qkv: jax.Array, scale: jax.Array, bias: jax.Array | None
    ) -> jax.Array:
        k, v = self.pool.k, self.pool.v
        o, k[slot], v[slot] = self._attend(qkv, scale, bias, self._cos, self._sin, k[slot], v[slot])
        return o


def rope_table(spec: ModelSpec, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin f32[T, H/2] of the angles at `positions` i32[T]; bfloat16 could not tell 257 from
    256."""
    frequencies, scale = spec.rope.frequencies(spec.head_dim)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale
