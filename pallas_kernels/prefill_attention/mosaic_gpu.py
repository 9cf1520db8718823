"""Prefill attention over pages as a Mosaic kernel for Hopper GPUs.

It is FlashAttention-3 (Shah et al., 2024) on ragged, paged input. A piece of work is one sequence's
part of a tile of 128 tokens of the batch, for one query head. One warpgroup copies queries and the
head's pages into shared memory, with the tensor memory accelerator. Two others take half of the
tile each; while one computes its softmax, the other keeps the tensor cores busy.

Blocks of threads are persistent: each takes one piece of work after another, and goes through the
blocks of all of them as one sequence, so that a piece begins while the one before it ends. Pieces
are dealt back and forth, long ones first, which balances the uneven work of the causal mask.

Tests interpret and lower the kernel; `pallas_kernels.check` runs it where there is a GPU.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PROCESSORS
from pallas_kernels.prefill_attention.mosaic_gpu_body import body, scratch_types
from pallas_kernels.prefill_attention.mosaic_gpu_work import BLOCK, COMPUTE, TILE, Plan


def refusal(q: jax.Array, k_pages: jax.Array, kv_pages: jax.Array) -> str | None:
    """Say why the kernel does not take these arguments, or return None."""
    del kv_pages
    _, _, page_size, head_dim = k_pages.shape
    if q.dtype != jnp.bfloat16 or k_pages.dtype != q.dtype:
        return f"q and pages must both be bfloat16, not {q.dtype} and {k_pages.dtype}"
    if page_size not in (8, 16, 32, 64) and page_size % BLOCK:
        return f"the page size must be 8, 16, 32, 64 or a multiple of {BLOCK}, not {page_size}"
    if head_dim not in (64, 128):
        return f"the head dim must be 64 or 128, not {head_dim}"
    return None


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
    programs: int = PROCESSORS,
    interpret: Any = None,
) -> jax.Array:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`; arguments are already checked.

    Args:
      programs: most blocks of threads.
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, _, page_size, _ = k_pages.shape
    padding = -tokens % TILE
    tiles = (tokens + padding) // TILE + kv_lens.shape[0]
    plan = Plan(
        heads=heads,
        group=heads // kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        listed_pages=kv_pages.shape[0],
        tiles=tiles,
        programs=min(programs, tiles * heads),
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
        weights_in_registers=interpret is None,
    )
    padded = jnp.pad(q, ((0, padding), (0, 0), (0, 0))) if padding else q
    tile_table = _tile_table(tiles, padded.shape[0], cu_pages, cu_q_lens, kv_lens)
    # This copies the list to memory of its own: if it is a slice, XLA (JAX 0.11.2) passes a pointer
    # into the longer array, aligned or not, and Mosaic refuses unaligned operands.
    own_pages = jnp.maximum(kv_pages, 0)
    return _launch(plan, interpret, padded, k_pages, v_pages, own_pages, tile_table)[:tokens]


def _tile_table(
    tiles: int, tokens: int, cu_pages: jax.Array, cu_q_lens: jax.Array, kv_lens: jax.Array
) -> jax.Array:
    """Return i32[tiles, 5]: each sequence's part of each tile, longest context first.

    The columns are the tile's first token, the first row and last row + 1 of the sequence in it,
    the position of row 0, and where the sequence's pages begin in the list. Rows that pad the batch
    belong to a last sequence without context; pieces that do not exist have no rows.

    Every layer of a model needs the same table; XLA computes it once. It compares all pieces with
    one another, which takes XLA few kernels; a sort takes many.
    """
    starts = cu_q_lens
    ends = jnp.append(cu_q_lens[1:], tokens)
    context = jnp.append(kv_lens - (cu_q_lens[1:] - cu_q_lens[:-1]), -tokens)
    first = starts // TILE
    counts = jnp.where(ends > starts, (ends - 1) // TILE + 1 - first, 0)
    sequence = jnp.arange(starts.shape[0], dtype=jnp.int32)
    before = jnp.where(sequence < sequence[:, None], counts, 0).sum(axis=1)

    piece = jnp.arange(tiles, dtype=jnp.int32)
    nth = piece[:, None] - before  # [tiles, B + 1], number among a sequence's pieces
    token = (first + nth) * TILE
    begin, end = jnp.clip(starts - token, 0, TILE), jnp.clip(ends - token, 0, TILE)
    position = token - starts + context
    pages = jnp.broadcast_to(cu_pages, token.shape)
    belongs = (nth >= 0) & (nth < counts)
    fields = jnp.stack([token, begin, end, position, pages], axis=2)
    table = jnp.where(belongs[:, :, None], fields, 0).sum(axis=1)

    context_end = jnp.where(table[:, 2] > 0, table[:, 3] + table[:, 2], -2 * tokens)
    is_longer = (context_end > context_end[:, None]) | (
        (context_end == context_end[:, None]) & (piece < piece[:, None])
    )
    rank = is_longer.astype(jnp.int32).sum(axis=1)
    is_placed = (rank == piece[:, None])[:, :, None]
    return jnp.where(is_placed, table, 0).sum(axis=1).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1))
def _launch(plan: Plan, interpret: Any, q: jax.Array, *operands: jax.Array) -> jax.Array:
    """Launch the kernel. It is jitted so that a model's layers share one lowering, of a second."""
    kernel = plgpu.kernel(
        partial(body, plan),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=scratch_types(plan, q.dtype),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="prefill_attention",
    )
    return kernel(q, *operands)
