"""Specification of paged_attention, and its implementation on the CPU.

It takes rows one after another, and a row's pages in blocks of a fixed number of tokens up to its
own length. So the time depends on the real tokens, not on the width of the page table, and a row's
bits depend on that row alone: neither other rows nor padding regroup its sums.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.online_softmax import (
    Running,
    attention_of,
    gather_pages,
    nothing_seen,
    see_block,
)
from pallas_kernels.quantised import Pages, elements_of

# Two blocks of K and V in float32 stay in a core's second-level cache for a few heads.
_BLOCK_TOKENS = 128


def paged_attention(
    q: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.api.paged_attention`; arguments are already checked."""
    _, heads, head_dim = q.shape
    kv_heads, _, page_size, _ = elements_of(k_pages).shape
    block_pages = max(1, _BLOCK_TOKENS // page_size)
    block = block_pages * page_size
    # Pad to whole blocks: a slice past the end would be moved back, not cut off.
    width = -page_table.shape[1] % block_pages
    page_table = jnp.pad(page_table, ((0, 0), (0, width)))

    def attend_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_row, table, kv_len = row  # [N, H], [W], []
        q_row = q_row.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, head_dim) * scale
        first = 0 if sliding_window is None else jnp.maximum(kv_len - sliding_window, 0)

        def attend_block(i: jax.Array, seen: Running) -> Running:
            page_ids = lax.dynamic_slice_in_dim(table, i * block_pages, block_pages)
            position = i * block + jnp.arange(block)
            visible = (first <= position) & (position < kv_len)  # [C]
            k = gather_pages(k_pages, page_ids)  # [K, C, H]
            # A weight of 0 does not remove a NaN, which unread memory may hold.
            v = jnp.where(visible[:, None], gather_pages(v_pages, page_ids), 0)
            return see_block(seen, q_row, k, v, visible, logit_soft_cap)

        seen = nothing_seen(kv_heads, heads // kv_heads, head_dim)
        seen = lax.fori_loop(first // block, (kv_len + block - 1) // block, attend_block, seen)
        return attention_of(seen).reshape(heads, head_dim)

    return lax.map(attend_row, (q, page_table, kv_lens)).astype(q.dtype)
