"""Attention over paged KV: the `attend` that both phases hand to the model, and the angles of
rotary embedding."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.quantised import Pages
from pdjax.core.model_spec import ModelSpec
from pdjax.device.models.llama import Attend

LayerPages = tuple[Pages, Pages]
"""Those of a layer: K and V, [K, P, S, H]."""

AttendPages = Callable[..., tuple[jax.Array, Pages, Pages]]
"""(qkv [T, K, G + 2, H], scale f32[T], bias [K, G + 2, H] or None, cos and sin f32[T, H/2], k_pages
and v_pages [K, P, S, H]) -> ([T, N, H], k_pages, v_pages): scales, shifts and rotates q and k,
writes k and v to their pages, and reads attention back from the pages of that layer."""


def attend_at(spec: ModelSpec, positions: jax.Array, attend_pages: AttendPages) -> Attend:
    """`transformer.Attend` of tokens at `positions` i32[T], whose cache are LayerPages."""
    cos, sin = rope_table(spec, positions)

    def attend(
        qkv: jax.Array, scale: jax.Array, bias: jax.Array | None, cache: LayerPages
    ) -> tuple[jax.Array, LayerPages]:
        o, k_pages, v_pages = attend_pages(qkv, scale, bias, cos, sin, *cache)
        return o, (k_pages, v_pages)

    return attend


def rope_table(spec: ModelSpec, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin f32[T, H/2] of the angles at `positions` i32[T]; bfloat16 could not tell 257 from
    256."""
    frequencies, scale = spec.rope.frequencies(spec.head_dim)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale
