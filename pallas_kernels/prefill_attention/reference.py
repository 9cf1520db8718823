"""Specification of prefill_attention, and its implementation on the CPU.

It takes queries in tiles of the packed batch. A tile visits the sequences that have tokens in it,
and for each only the blocks of pages up to its newest token there. So only one tile of scores
exists at a time, keys of later tokens or of other prompts cost nothing, and a token's sums are
grouped by its own sequence's pages alone, however prompts are packed or cut into chunks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.finite import guarded
from pallas_kernels.online_softmax import (
    Running,
    attention_of,
    gather_pages,
    nothing_seen,
    see_block,
)

# On the CPU larger tiles gain nothing on long prompts, and waste most of their work on short ones.
_TILE_TOKENS = 64
_BLOCK_TOKENS = 64


class _Cache(NamedTuple):
    k_pages: jax.Array  # [K, P, S, H]
    v_pages: jax.Array  # [K, P, S, H]
    kv_pages: jax.Array  # i32[Z and a block of pages]
    cu_pages: jax.Array  # i32[B + 1]
    cu_q_lens: jax.Array  # i32[B + 1]
    shift: jax.Array  # i32[B]; token t of sequence b has position t + shift[b]


class _Tile(NamedTuple):
    q: jax.Array  # [Q, N, H]
    token: jax.Array  # i32[Q], index into the packed batch
    sequence: jax.Array  # i32[Q], ascending; B is padding


def prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    kv_pages: jax.Array,
    cu_pages: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> jax.Array:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`; arguments are already
    checked."""
    tokens, heads, head_dim = q.shape
    size = min(_TILE_TOKENS, tokens)
    tiles = -(-tokens // size)
    block_pages = max(1, _BLOCK_TOKENS // k_pages.shape[2])
    # Pad the list: a slice past the end would be moved back, not cut off.
    kv_pages = jnp.pad(kv_pages, (0, block_pages))
    cache = _Cache(k_pages, v_pages, kv_pages, cu_pages, cu_q_lens, kv_lens - cu_q_lens[1:])

    token = jnp.arange(tiles * size, dtype=jnp.int32)
    sequence = jnp.searchsorted(cu_q_lens[1:], token, side="right").astype(jnp.int32)
    q_tiles = jnp.pad(q, ((0, tiles * size - tokens), (0, 0), (0, 0)))
    batch = _Tile(
        q=q_tiles.reshape(tiles, size, heads, head_dim),
        token=token.reshape(tiles, size),
        sequence=sequence.reshape(tiles, size),
    )
    attend = partial(
        _attend_tile,
        cache=cache,
        block_pages=block_pages,
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
    )
    out = lax.map(attend, batch)  # [tiles, Q, N, H]
    return out.reshape(-1, heads, head_dim)[:tokens].astype(q.dtype)


def _attend_tile(
    tile: _Tile,
    *,
    cache: _Cache,
    block_pages: int,
    scale: float,
    logit_soft_cap: float | None,
    sliding_window: int | None,
) -> jax.Array:
    """Compute the attention of a tile, float32[Q, N, H]."""
    size, heads, head_dim = tile.q.shape
    kv_heads, _, page_size, _ = cache.k_pages.shape
    group = heads // kv_heads
    block = block_pages * page_size
    q = tile.q.astype(jnp.float32).reshape(size, kv_heads, group, head_dim) * scale
    q = q.transpose(1, 2, 0, 3).reshape(kv_heads, group * size, head_dim)

    def attend_sequence(b: jax.Array, seen: Running) -> Running:
        shift, q_start, q_end = cache.shift[b], cache.cu_q_lens[b], cache.cu_q_lens[b + 1]
        position = jnp.where(tile.sequence == b, tile.token + shift, -1)[:, None]  # -1 sees nothing
        start: jax.Array | int = 0
        if sliding_window is not None:
            oldest = jnp.maximum(tile.token[0], q_start) + shift
            start = jnp.maximum(oldest - sliding_window + 1, 0)
        end = jnp.minimum(tile.token[-1] + 1, q_end) + shift

        def attend_block(i: jax.Array, seen: Running) -> Running:
            at = cache.cu_pages[b] + i * block_pages
            page_ids = lax.dynamic_slice_in_dim(cache.kv_pages, at, block_pages)
            key = i * block + jnp.arange(block)
            visible = key <= position  # [Q, C]
            if sliding_window is not None:
                visible &= position - key < sliding_window
            # A weight of 0 does not remove a NaN. Unread memory may hold one, and so may tokens
            # that some queries of the tile see and others do not: `guarded` moves it to K.
            k, v = guarded(  # [K, C, H]
                gather_pages(cache.k_pages, page_ids),
                gather_pages(cache.v_pages, page_ids),
                jnp.inf,
            )
            return see_block(seen, q, k, v, jnp.tile(visible, (group, 1)), logit_soft_cap)

        blocks = jnp.where(q_start < q_end, (end + block - 1) // block, 0)
        return lax.fori_loop(start // block, blocks, attend_block, seen)

    present = tile.sequence < cache.shift.shape[0]
    behind_last = jnp.where(present, tile.sequence + 1, 0).max()
    seen = nothing_seen(kv_heads, group * size, head_dim)
    seen = lax.fori_loop(tile.sequence[0], behind_last, attend_sequence, seen)
    out = attention_of(seen).reshape(kv_heads, group, size, head_dim)
    return out.transpose(2, 0, 1, 3).reshape(size, heads, head_dim)
