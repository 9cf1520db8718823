"""Decode attention as a Mosaic kernel for Hopper GPUs.

Flash-decoding (Dao et al., 2023) over pages, in blocks of threads that stay: each takes one piece
of work after another, a row's share for one KV head, and one of its two warpgroups copies pages
into a ring in shared memory, by the tensor memory accelerator, while the other takes the two
products from it. The ring runs on from one piece of work to the next, so memory never waits for a
piece to be finished or begun. Where there are fewer pieces than processors, a row is cut into
parts, and their results are put together afterwards.

`append_attention` also does what comes before: it takes the projection's output as it is, scales
and rotates it, and writes the new K and V to their page. The new token's own score starts the
running softmax, so nothing that was just written has to be read back.

The queries of a KV head fill few of the 64 rows that a product must have; decode waits for memory
anyway. The tests interpret and lower the kernel; `pallas_kernels.check` runs it where there is a
GPU.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PROCESSORS, ROWS
from pallas_kernels.paged_attention.mosaic_gpu_body import body, scratch_types
from pallas_kernels.paged_attention.mosaic_gpu_work import BLOCK, Plan
from pallas_kernels.quantised import Pages, QuantisedPages, elements_of

# In the time that a block of 64 tokens takes where every processor reads, 1.5 us on an H100 at head
# dim 128: to begin and end a piece of work, and to put parts together. Estimates from profiles of a
# few shapes; other numbers of parts have not been timed beside those that they choose.
_PIECE_COST = 1.5
_JOIN_COST = 2.0
_MOST_PARTS = 32
_PAIRS = 2  # of warpgroups, over quantised pages: one makes bfloat16 of them while the other waits
_MOST_SHARED = 128  # head dim of which two programs fit into shared memory


def refusal(q: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str | None:
    """Why `paged_attention` does not take these arguments, or None."""
    del page_table
    return _refusal(q.dtype, q.shape[1] // k_pages.shape[0], ROWS, k_pages)


def append_refusal(qkv: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str | None:
    """Why `append_attention` does not take these arguments, or None."""
    del page_table
    return _refusal(qkv.dtype, qkv.shape[2] - 2, ROWS - 2, k_pages)  # K and V are rows, too


def _refusal(dtype: Any, group: int, most: int, k_pages: jax.Array) -> str | None:
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
    if group > most:
        return f"a KV head may have at most {most} query heads, not {group}"
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
    parts: int | None = None,
    programs: int = PROCESSORS,
    interpret: Any = None,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.api.paged_attention`; arguments are taken as checked.

    Args:
      parts: pieces of work that share a row and a KV head; None chooses.
      programs: blocks of threads, at most; over quantised pages each is two programs.
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
    """
    rows, heads, head_dim = q.shape
    kv_heads = elements_of(k_pages).shape[0]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    plan = _make_plan(
        grouped, k_pages, page_table, parts, programs, False, scale, logit_soft_cap, sliding_window
    )
    metadata = _aligned(page_table), _aligned(kv_lens)
    return _read(plan, interpret, grouped, *_arrays(k_pages, v_pages), *metadata)


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
    parts: int | None = None,
    programs: int = PROCESSORS,
    interpret: Any = None,
) -> tuple[jax.Array, Pages, Pages]:
    """See `pallas_kernels.paged_attention.api.append_attention`; arguments are taken as checked.

    Args:
      parts, programs, interpret: as in `paged_attention`.
    """
    if bias is not None:
        qkv = (qkv * row_scale[:, None, None, None] + bias).astype(qkv.dtype)
        row_scale = jnp.ones_like(row_scale)
    plan = _make_plan(
        qkv, k_pages, page_table, parts, programs, True, scale, logit_soft_cap, sliding_window
    )
    metadata = _aligned(page_table), _aligned(kv_lens)
    pools = _arrays(k_pages, v_pages)
    out, k, v, *scales = _append(plan, interpret, qkv, pools, *metadata, row_scale, cos, sin)
    return out, *(
        (QuantisedPages(k, scales[0]), QuantisedPages(v, scales[1])) if scales else (k, v)
    )


def _arrays(k_pages: Pages, v_pages: Pages) -> tuple[jax.Array, ...]:
    """Elements of K and of V, then scales, if they have any."""
    both = k_pages, v_pages
    scales = (pages.scales for pages in both if isinstance(pages, QuantisedPages))
    return *map(elements_of, both), *scales


def _aligned(x: jax.Array) -> jax.Array:
    """x, whose numbers are not negative, in memory of its own.

    XLA (of JAX 0.11.2) hands a kernel that takes a slice of something longer a pointer into that if
    the slice fills whole units of memory, wherever it begins; Mosaic then refuses to run.
    """
    return jnp.maximum(x, 0)


def _choose_parts(pieces: int, blocks: int, programs: int) -> int:
    """Into how many parts to cut each of so many pieces of work of so many blocks: those with which
    the busiest program is done first."""

    def time(parts: int) -> float:
        turns = pl.cdiv(pieces * parts, programs)
        return turns * (pl.cdiv(blocks, parts) + _PIECE_COST) + (parts > 1) * _JOIN_COST

    return min(range(1, min(blocks, _MOST_PARTS) + 1), key=time)


def _make_plan(
    loaded: jax.Array,
    k_pages: Pages,
    page_table: jax.Array,
    parts: int | None,
    programs: int,
    append: bool,
    scale: float,
    logit_soft_cap: float | None,
    sliding_window: int | None,
) -> Plan:
    rows, kv_heads, loaded_rows, head_dim = loaded.shape
    page_size, width = elements_of(k_pages).shape[2], page_table.shape[1]
    blocks = pl.cdiv(width * page_size, BLOCK)
    scaled = isinstance(k_pages, QuantisedPages)
    pairs = _PAIRS if scaled and head_dim <= _MOST_SHARED else 1
    programs *= pairs
    parts = parts or _choose_parts(rows * kv_heads, blocks, programs)
    work = rows * kv_heads * parts
    return Plan(
        rows=rows,
        kv_heads=kv_heads,
        group=loaded_rows - 2 * append,
        head_dim=head_dim,
        width=width,
        page_size=page_size,
        parts=parts,
        programs=min(programs, work + -work % pairs),
        pairs=pairs,
        append=append,
        scaled=scaled,
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
    )


# Functions of their own, so that a model's layers share one lowering: it takes a second.


@partial(jax.jit, static_argnums=(0, 1))
def _read(plan: Plan, interpret: Any, q: jax.Array, *operands: jax.Array) -> jax.Array:
    return _put_together(plan, _launch(plan, interpret, q, *operands), q.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _append(
    plan: Plan,
    interpret: Any,
    qkv: jax.Array,
    pools: tuple[jax.Array, ...],
    *operands: jax.Array,
) -> tuple[jax.Array, ...]:
    # Mutable, so that the kernel writes into the pools it is given.
    refs = [jax.new_ref(pool) for pool in pools]
    out = _put_together(plan, _launch(plan, interpret, qkv, *refs, *operands), qkv.dtype)
    return out, *map(jax.freeze, refs)


def _launch(plan: Plan, interpret: Any, loaded: jax.Array, *operands: Any) -> Any:
    """[B, K, G, H] of one part, or of several float32[B, K, parts, G, H] and log2 of the sums of
    their weights, f32[B, K, parts, G], with G padded."""
    shape = (plan.rows, plan.kv_heads, plan.group, plan.head_dim)
    split = (*shape[:2], plan.parts)
    whole = (jax.ShapeDtypeStruct(shape, loaded.dtype),)
    in_parts = (
        jax.ShapeDtypeStruct((*split, *plan.part_shape), jnp.float32),
        jax.ShapeDtypeStruct((*split, plan.group + plan.padding), jnp.float32),
    )
    kernel = plgpu.kernel(
        partial(body, plan),
        out_type=whole if plan.parts == 1 else in_parts,
        scratch_types=scratch_types(plan, loaded.dtype),
        grid=(plan.programs // plan.pairs,),
        grid_names=("program",),
        num_threads=2 * plan.pairs,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="append_attention" if plan.append else "paged_attention",
    )
    out = kernel(loaded, *operands)
    return (out[0].swapaxes(-1, -2), out[1]) if plan.scaled and plan.parts > 1 else out


def _put_together(plan: Plan, out: Any, dtype: Any) -> jax.Array:
    """[B, N, H] of the parts' results.

    Written without a reduction, so that XLA makes one kernel of it.
    """
    heads = (plan.rows, plan.kv_heads * plan.group, plan.head_dim)
    if plan.parts == 1:
        return out[0].reshape(heads)
    values, log_totals = (
        [x[:, :, part, : plan.group] for part in range(plan.parts)]
        for x in (out[0], out[1][..., None])
    )
    highest = log_totals[0]
    for other in log_totals[1:]:
        highest = jnp.maximum(highest, other)
    weights = [jnp.exp2(log_total - highest) for log_total in log_totals]
    weighted = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return (weighted / sum(weights)).reshape(heads).astype(dtype)
