"""Paged attention as a Mosaic kernel for TPUs.

Each row is one program. It walks the row's pages in blocks: while it multiplies one block, the
copies of the next block's pages run from HBM into the other half of a double buffer. One copy moves
all KV heads of a page. Tests interpret and lower it, and the compiler of libtpu 0.0.48 takes it
for v5e and v6e; it has not run on a TPU yet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.online_softmax import LOWEST, MASKED

_TILE_BYTES = 32  # bytes of a column of a tile: 8 rows of float32, 16 of bfloat16
_BUFFER_BYTES = 4 << 20  # VMEM for K and V; it holds at least 16 MiB
_MAX_BLOCK_TOKENS = 512
_TABLE_BYTES = 512 << 10  # scalar memory for the page table: half of it

_Seen = tuple[jax.Array, jax.Array, jax.Array]
"""The running softmax of one KV head, float32: weighted values [G, H], highest score [G, 1], sum of
weights [G, 1]."""


@dataclass(frozen=True)
class _Plan:
    """The static parameters of a launch."""

    width: int  # entries of a row of the page table
    page_size: int
    block_pages: int
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None


def refusal(q: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str | None:
    """Say why the kernel does not take these arguments, or return None."""
    page_size, head_dim = k_pages.shape[2:]
    page_bytes = _page_bytes(k_pages)
    table_bytes = page_table.size * page_table.dtype.itemsize
    if q.dtype not in (jnp.float32, jnp.bfloat16) or k_pages.dtype != q.dtype:
        return f"q and pages must both be float32 or bfloat16, not {q.dtype} and {k_pages.dtype}"
    if page_size % _tile_rows(q):
        return f"the page size of {q.dtype} must be a multiple of {_tile_rows(q)}, not {page_size}"
    if head_dim % 64:
        return f"the head dim must be a multiple of 64, not {head_dim}"
    if 4 * page_bytes > _BUFFER_BYTES:
        return f"four pages of {page_bytes} bytes exceed the buffer of {_BUFFER_BYTES} bytes"
    if table_bytes > _TABLE_BYTES:
        return f"a page table of {table_bytes} bytes exceeds {_TABLE_BYTES} bytes"
    return None


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.api.paged_attention`; arguments are already checked.

    Args:
      interpret: run in Pallas' interpreter, on the CPU.
    """
    rows, heads, head_dim = q.shape
    kv_heads, _, page_size, _ = k_pages.shape
    group = heads // kv_heads
    padding = -group % _tile_rows(q)  # makes a KV head's queries whole tiles
    width = page_table.shape[1]
    plan = _Plan(
        width=width,
        page_size=page_size,
        block_pages=_block_pages(k_pages, width),
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
    )
    q_block = (1, kv_heads, group + padding, head_dim)
    q_spec = pl.BlockSpec(q_block, lambda row, *_: (row, 0, 0, 0))
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    buffer = pltpu.VMEM((2, kv_heads, plan.block_pages * page_size, head_dim), k_pages.dtype)
    kernel = pl.pallas_call(
        partial(_attend_row, plan),
        out_shape=jax.ShapeDtypeStruct((rows, *q_block[1:]), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows,),
            in_specs=[q_spec, in_place, in_place],
            out_specs=q_spec,
            scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2, 2))],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="paged_attention",
    )
    grouped = q.reshape(rows, kv_heads, group, head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, padding), (0, 0)))
    # A table of two dimensions would be padded to whole tiles in scalar memory.
    out = kernel(page_table.reshape(-1), kv_lens, grouped, k_pages, v_pages)
    return out[:, :, :group].reshape(rows, heads, head_dim)


def _tile_rows(x: jax.Array) -> int:
    return _TILE_BYTES // x.dtype.itemsize


def _page_bytes(pages: jax.Array) -> int:
    kv_heads, _, page_size, head_dim = pages.shape
    return kv_heads * page_size * head_dim * pages.dtype.itemsize


def _block_pages(pages: jax.Array, width: int) -> int:
    """Number of pages of a block: two blocks of K and of V fill the buffer, within a limit."""
    fitting = _BUFFER_BYTES // (4 * _page_bytes(pages))
    return min(fitting, max(1, _MAX_BLOCK_TOKENS // pages.shape[2]), width)


def _attend_row(
    plan: _Plan,
    table_ref: jax.Ref,  # i32[B * W], scalar memory
    lens_ref: jax.Ref,  # i32[B], scalar memory
    q_ref: jax.Ref,  # [1, K, G, H], G padded to whole tiles
    k_ref: jax.Ref,  # [K, P, S, H], HBM
    v_ref: jax.Ref,  # [K, P, S, H], HBM
    out_ref: jax.Ref,  # [1, K, G, H]
    k_buffer: jax.Ref,  # [2, K, C, H]
    v_buffer: jax.Ref,  # [2, K, C, H]
    arrived: jax.Ref,  # semaphores [2, 2], one for each half of each buffer
) -> None:
    row = pl.program_id(0)
    kv_len = lens_ref[row]
    _, kv_heads, group, head_dim = q_ref.shape
    page_size, block_pages, window = plan.page_size, plan.block_pages, plan.sliding_window
    block = block_pages * page_size
    oldest = 0 if window is None else jnp.maximum(kv_len - window, 0)
    first, end = lax.div(oldest, block), pl.cdiv(kv_len, block)

    def each_page(i: jax.Array, act: Callable[[Any], None]) -> None:
        """Call `act` with each copy of block i; pages without a visible token are not copied."""
        half = lax.rem(i, 2)
        lower = jnp.maximum(i * block_pages, lax.div(oldest, page_size))
        upper = jnp.minimum((i + 1) * block_pages, pl.cdiv(kv_len, page_size))

        @pl.loop(lower, upper)
        def _(page: jax.Array) -> None:
            source = table_ref[row * plan.width + page]
            at = pl.multiple_of((page - i * block_pages) * page_size, page_size)
            for kind, (pages, buffer) in enumerate(((k_ref, k_buffer), (v_ref, v_buffer))):
                target = buffer.at[half, :, pl.ds(at, page_size)]
                act(pltpu.make_async_copy(pages.at[:, source], target, arrived.at[half, kind]))

    def attend_block(i: jax.Array, seen: list[_Seen]) -> list[_Seen]:
        pl.when(i + 1 < end)(lambda: each_page(i + 1, lambda copy: copy.start()))
        each_page(i, lambda copy: copy.wait())
        half = lax.rem(i, 2)

        def visible(shape: tuple[int, int], axis: int) -> jax.Array:
            position = i * block + lax.broadcasted_iota(jnp.int32, shape, axis)
            return (oldest <= position) & (position < kv_len)

        columns, rows = visible((1, block), 1), visible((block, 1), 0)
        return [
            _see_block(
                plan, of, q_ref[0, head], k_buffer[half, head], v_buffer[half, head], columns, rows
            )
            for head, of in enumerate(seen)
        ]

    pl.when(first < end)(lambda: each_page(first, lambda copy: copy.start()))
    nothing = (
        jnp.zeros((group, head_dim), jnp.float32),
        jnp.full((group, 1), LOWEST, jnp.float32),
        jnp.zeros((group, 1), jnp.float32),
    )
    seen = lax.fori_loop(first, end, attend_block, [nothing] * kv_heads)
    for head, (weighted, _, total) in enumerate(seen):
        out_ref[0, head] = (weighted / jnp.where(total > 0, total, 1)).astype(out_ref.dtype)


def _see_block(
    plan: _Plan,
    seen: _Seen,
    q: jax.Array,  # [G, H]
    k: jax.Array,  # [C, H]
    v: jax.Array,  # [C, H]
    columns: jax.Array,  # bool[1, C], the visible tokens
    rows: jax.Array,  # bool[C, 1], the same
) -> _Seen:
    """Do online_softmax.see_block for one KV head, with products in the pages' own type."""
    weighted, highest, total = seen
    dot = partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    scores = dot(q, k, (((1,), (1,)), ((), ()))) * plan.scale  # [G, C]
    if plan.logit_soft_cap is not None:
        scores = plan.logit_soft_cap * jnp.tanh(scores / plan.logit_soft_cap)
    scores = jnp.where(columns, scores, MASKED)
    higher = jnp.maximum(highest, scores.max(axis=1, keepdims=True))
    weights = jnp.exp(scores - higher)
    fade = jnp.exp(highest - higher)
    # A weight of 0 does not remove a NaN, which unread memory may hold. Older TPUs select only
    # among 32-bit numbers.
    finite = jnp.where(rows, v.astype(jnp.float32), 0).astype(v.dtype)
    values = dot(weights.astype(v.dtype), finite, (((1,), (0,)), ((), ())))  # [G, H]
    return (
        weighted * fade + values,
        higher,
        total * fade + weights.sum(axis=1, keepdims=True),
    )
