"""Decode attention as a Mosaic kernel for Hopper GPUs.

It is Flash-decoding (Dao et al., 2023) over pages, in persistent blocks of threads. A block takes
one piece of work after another: a row, or a part of it, for one KV head. One of its warpgroups
copies pages into a ring in shared memory, with the tensor memory accelerator, while one or two
others compute the two products from it. The ring continues from one piece of work to the next, so
memory never waits for a piece to end or begin. Where pieces are fewer than processors, every row is
cut into parts, and their results are combined afterwards. Where they are more, only long rows are
cut: otherwise all rows would wait for one that is many times as long.

`append_attention` also does the operations before: it takes the projection's output as it is,
scales and rotates it, and writes the new K and V to their page. The new token's own score starts
the running softmax, so the kernel never reads back what it has just written.

The queries of a KV head fill few of the 64 rows that a product must have, but memory bandwidth
bounds decode anyway. Tests interpret and lower the kernel; `pallas_kernels.check` runs it where
there is a GPU.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ROWS
from pallas_kernels.online_softmax import LOWEST
from pallas_kernels.paged_attention.mosaic_gpu_body import body, scratch_types
from pallas_kernels.paged_attention.mosaic_gpu_plan import (
    BLOCK,
    REDUCTION_BYTES,
    Plan,
    make_plan,
    scaled_stages,
)
from pallas_kernels.paged_attention.mosaic_gpu_work import cut
from pallas_kernels.quantised import Pages, QuantisedPages, elements_of


def refusal(q: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str | None:
    """Say why `paged_attention` does not take these arguments, or return None."""
    del page_table
    return _refusal(q.dtype, q.shape[1] // k_pages.shape[0], k_pages, append=False)


def append_refusal(qkv: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str | None:
    """Say why `append_attention` does not take these arguments, or return None."""
    del page_table
    return _refusal(qkv.dtype, qkv.shape[2] - 2, k_pages, append=True)


def _refusal(dtype: Any, group: int, k_pages: jax.Array, *, append: bool) -> str | None:
    _, _, page_size, head_dim = k_pages.shape
    if dtype != jnp.bfloat16 or k_pages.dtype not in (dtype, jnp.int8):
        return (
            f"q and pages must both be bfloat16, or the pages int8, not {dtype} and {k_pages.dtype}"
        )
    if k_pages.dtype == jnp.int8 and page_size in (8, 16):
        return f"the page size of int8 must be at least 32, not {page_size}"
    if page_size not in (8, 16, 32) and page_size % BLOCK:
        return f"the page size must be 8, 16, 32 or a multiple of {BLOCK}, not {page_size}"
    if head_dim not in (64, 128, 256):
        return f"the head dim must be 64, 128 or 256, not {head_dim}"
    most = ROWS - 2 * append  # K and V are rows, too
    if group > most:
        return f"a KV head may have at most {most} query heads, not {group}"
    queries, slots = group + -group % 8, 1 if head_dim > 128 else 2
    if k_pages.dtype == jnp.int8 and scaled_stages(head_dim, queries, slots, append) < 2:
        return f"{group} query heads a KV head of {head_dim} leave no room for pages of int8"
    return None


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
    interpret: Any = None,
    **chosen: Any,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.api.paged_attention`; arguments are already checked.

    Args:
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
      **chosen: arguments of `make_plan` that it would otherwise choose.
    """
    rows, heads, head_dim = q.shape
    kv_heads = elements_of(k_pages).shape[0]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    plan = make_plan(
        grouped,
        k_pages,
        page_table,
        append=False,
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
        weights_in_registers=interpret is None,
        **chosen,
    )
    metadata, parts_of_rows = _metadata(plan, page_table, kv_lens)
    pools = _arrays(k_pages, v_pages)
    return _read(plan, interpret, parts_of_rows, grouped, *pools, *metadata)


def append_attention(
    qkv: jax.Array,
    row_scale: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
    interpret: Any = None,
    **chosen: Any,
) -> tuple[jax.Array, Pages, Pages]:
    """See `pallas_kernels.paged_attention.api.append_attention`; arguments are already checked.

    Args:
      interpret, **chosen: as in `paged_attention`.
    """
    if bias is not None:
        qkv = (qkv * row_scale[:, None, None, None] + bias).astype(qkv.dtype)
        row_scale = jnp.ones_like(row_scale)
    plan = make_plan(
        qkv,
        k_pages,
        page_table,
        append=True,
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
        weights_in_registers=interpret is None,
        **chosen,
    )
    metadata, parts_of_rows = _metadata(plan, page_table, kv_lens)
    pools, token = _arrays(k_pages, v_pages), (row_scale, cos, sin)
    out, k, v, *scales = _append(plan, interpret, parts_of_rows, qkv, pools, *metadata, *token)
    return out, *(
        (QuantisedPages(k, scales[0]), QuantisedPages(v, scales[1])) if scales else (k, v)
    )


def _arrays(k_pages: Pages, v_pages: Pages) -> tuple[jax.Array, ...]:
    """List the elements of K and of V, then their scales, if they have any."""
    both = k_pages, v_pages
    scales = (pages.scales for pages in both if isinstance(pages, QuantisedPages))
    return *map(elements_of, both), *scales


def _metadata(
    plan: Plan, page_table: jax.Array, kv_lens: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Return the kernel's metadata operands, and each row's number of parts, or None where all rows
    have the same number. Neither depends on the layer, so a model's layers share them."""
    table, lens = _aligned(page_table), _aligned(kv_lens)
    if plan.by_length is None:
        return (table, lens), None
    entries, parts = cut(plan, kv_lens)
    return (table, lens, entries), parts


def _aligned(x: jax.Array) -> jax.Array:
    """Copy x, which has no negative numbers, to memory of its own.

    If x is a slice that fills whole units of memory, XLA (JAX 0.11.2) passes a kernel a pointer
    into the longer array, at any alignment; Mosaic then refuses to run.
    """
    return jnp.maximum(x, 0)


# The launches are jitted so that a model's layers share one lowering, of a second.


@partial(jax.jit, static_argnums=(0, 1))
def _read(
    plan: Plan,
    interpret: Any,
    parts: jax.Array | None,
    q: jax.Array,
    *operands: jax.Array,
) -> jax.Array:
    return _combine_parts(plan, parts, _launch(plan, interpret, q, *operands), q.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _append(
    plan: Plan,
    interpret: Any,
    parts: jax.Array | None,
    qkv: jax.Array,
    pools: tuple[jax.Array, ...],
    *operands: jax.Array,
) -> tuple[jax.Array, ...]:
    # References, so that the kernel writes into the given pools.
    refs = [jax.new_ref(pool) for pool in pools]
    out = _launch(plan, interpret, qkv, *refs, *operands)
    return _combine_parts(plan, parts, out, qkv.dtype), *map(jax.freeze, refs)


def _launch(plan: Plan, interpret: Any, loaded: jax.Array, *operands: Any) -> Any:
    """Run the kernel. Rows of one part give [B, K, G, H]. Rows of several parts give
    float32[B, K, parts, G, H] and log2 of the sums of their weights, f32[B, K, parts, G], with G
    padded. Where a launch has both kinds of rows, the latter arrays come first."""
    shape = (plan.rows, plan.kv_heads, plan.group, plan.head_dim)
    split = (*shape[:2], plan.parts)
    whole = (jax.ShapeDtypeStruct(shape, loaded.dtype),)
    in_parts = (
        jax.ShapeDtypeStruct((*split, *plan.part_shape), jnp.float32),
        jax.ShapeDtypeStruct((*split, plan.group + plan.padding), jnp.float32),
    )
    one_part = plan.parts == 1 or plan.by_length is not None
    kernel = plgpu.kernel(
        partial(body, plan),
        out_type=in_parts * (plan.parts > 1) + whole * one_part,
        scratch_types=scratch_types(plan, loaded.dtype),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=plan.readers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=REDUCTION_BYTES
        ),
        interpret=interpret,
        kernel_name="append_attention" if plan.append else "paged_attention",
    )
    out = kernel(loaded, *operands)
    if plan.scaled and plan.parts > 1:
        out = out[0].swapaxes(-1, -2)[..., : plan.group, :], out[1]
    return out


def _combine_parts(plan: Plan, parts: jax.Array | None, out: Any, dtype: Any) -> jax.Array:
    """Combine the arrays that `_launch` returns into [B, N, H].

    It uses no reduction, so that XLA makes one kernel of it.

    Args:
      parts: i32[B], each row's number of parts; None where all rows have the same number.
    """
    heads = (plan.rows, plan.kv_heads * plan.group, plan.head_dim)
    if plan.parts == 1:
        return out[0].reshape(heads)
    values, log_totals = (
        [_part(x, part, parts) for part in range(plan.parts)]
        for x in (out[0], out[1][..., : plan.group, None])
    )
    if parts is not None:
        exists = [(part < parts)[:, None, None, None] for part in range(plan.parts)]
        log_totals = [jnp.where(*each, LOWEST) for each in zip(exists, log_totals, strict=True)]
    highest = log_totals[0]
    for other in log_totals[1:]:
        highest = jnp.maximum(highest, other)
    weights = [jnp.exp2(log_total - highest) for log_total in log_totals]
    weighted = sum(value * weight for value, weight in zip(values, weights, strict=True))
    joined = jnp.divide(weighted, sum(weights)).astype(dtype)
    if parts is not None:
        joined = jnp.where((parts > 1)[:, None, None, None], joined, out[-1])
    return joined.reshape(heads)


def _part(x: jax.Array, part: int, parts: jax.Array | None) -> jax.Array:
    """Return x[:, :, part], or finite numbers of the same row where the row has fewer parts. Rows
    of one part have undefined numbers in x; for them the first row is read, since their own would
    be fetched from memory."""
    if parts is None:
        return x[:, :, part]
    row = jnp.where(parts > 1, jnp.arange(len(parts)), 0)
    return x.at[row, :, jnp.where(part < parts, part, 0)].get(mode="promise_in_bounds")
