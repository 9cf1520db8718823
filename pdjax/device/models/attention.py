"""Attention over paged KV: the `attend` that both phases hand to the model, and the angles of
rotary embedding."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.quantised import Pages
from pdjax.core.model_spec import ModelSpec, RopeSpec
from pdjax.device.models.family import Attend, LayerKind

LayerPages = tuple[Pages, Pages]
"""Those of a layer: K and V, [K, P, S, H]."""

AttendPages = Callable[..., tuple[jax.Array, Pages, Pages]]
"""(qkv [T, K, J, H], scale f32[T], bias [K, J, H] or None, cos and sin f32[T, H/2], k_pages and
v_pages [K, P, S, H], options of `LayerKind.attention`) -> ([T, N, H], k_pages, v_pages): scales,
shifts and rotates q and k, writes k and v to their pages, and reads attention back from the pages
of that layer."""


def attend_at(
    spec: ModelSpec,
    kinds: Sequence[LayerKind],
    positions: jax.Array,
    attend_pages: AttendPages,
) -> Attend:
    """Make the `family.Attend` of tokens at `positions` i32[T] in layers of `kinds`, whose caches
    are LayerPages."""
    ropes = dict.fromkeys(kind.rope for kind in kinds)
    angles = {rope: rope_table(rope, spec.head_dim, positions) for rope in ropes}

    def attend(
        qkv: jax.Array,
        scale: jax.Array,
        bias: jax.Array | None,
        cache: LayerPages,
        kind: LayerKind,
    ) -> tuple[jax.Array, LayerPages]:
        # Layers of all kinds keep every page of a sequence, so one page table serves them all:
        # the one in `attend_pages`. A kind that drops pages behind its window would choose its
        # own here.
        options = kind.attention(spec.head_dim)
        o, k_pages, v_pages = attend_pages(qkv, scale, bias, *angles[kind.rope], *cache, **options)
        return o, (k_pages, v_pages)

    return attend


def rope_table(rope: RopeSpec, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin f32[T, H/2] of the angles at `positions` i32[T]; bfloat16 could not tell 257 from
    256. Pairs of dimensions that are not rotated, the last ones, have the angle 0."""
    frequencies, scale = rope.frequencies(head_dim)
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    still = ((0, 0), (0, head_dim // 2 - len(frequencies)))
    cos = jnp.pad(jnp.cos(angles) * scale, still, constant_values=1)
    return cos, jnp.pad(jnp.sin(angles) * scale, still)
