"""Specification of rope_and_write, and its implementation on the CPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.finite import finite_below, guarded
from pallas_kernels.quantised import Pages, QuantisedPages, elements_of, encode


def rope_and_write(
    qkv: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    slot_mapping: jax.Array,
) -> tuple[jax.Array, Pages, Pages]:
    """See `pallas_kernels.kv_write.api.rope_and_write`; arguments are already checked."""
    tokens, kv_heads, rows, head_dim = qkv.shape
    x = qkv.astype(jnp.float32) * scale[:, None, None, None]
    if bias is not None:
        x += bias.astype(jnp.float32)
    rotated = _rotate(x[:, :, :-1], cos[:, None, None], sin[:, None, None])
    q = rotated[:, :, :-1].astype(qkv.dtype).reshape(tokens, kv_heads * (rows - 2), head_dim)
    scaled = isinstance(k_pages, QuantisedPages)
    below = finite_below(jnp.float32 if scaled else elements_of(k_pages).dtype)
    k, v = guarded(rotated[:, :, -1], x[:, :, -1], below)
    return q, _write(k_pages, k, slot_mapping), _write(v_pages, v, slot_mapping)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [..., H] by angles with cos and sin [..., H/2].

    Dimension i of the first half is paired with i of the second, in Hugging Face's layout.
    """
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _write(pages: Pages, new: jax.Array, slot_mapping: jax.Array) -> Pages:
    """Write `new` [T, K, H] into `pages` [K, P, S, H] at the flat addresses `slot_mapping`.

    The pool is never reshaped: XLA on the CPU would copy it to write through a flat view.
    """
    page_size = elements_of(pages).shape[2]
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    new = new.swapaxes(0, 1)
    if not isinstance(pages, QuantisedPages):
        return pages.at[:, page, offset].set(new.astype(pages.dtype))
    elements, scales = encode(new, pages.elements.dtype.name)
    return QuantisedPages(
        pages.elements.at[:, page, offset].set(elements),
        pages.scales.at[:, page, offset].set(scales),
    )
