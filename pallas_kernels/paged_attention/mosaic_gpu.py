"""Paged attention as a Mosaic kernel for Hopper GPUs.

Flash-decoding (Dao et al., 2023) over pages: one block of threads for each row, KV head and part of
the row. One warpgroup copies pages into a ring in shared memory, by the tensor memory accelerator,
while another takes the two products from it. The queries of a KV head fill few of the 64 rows that
a product must have; decode waits for memory anyway. The tests interpret and lower it;
`pallas_kernels.check` runs it where there is a GPU.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.online_softmax import LOWEST, MASKED

_ROWS = 64  # of a warpgroup's product
_TILE_ROWS = 8
_BLOCK = 64  # tokens of a stage of the ring
_STAGES = 3
_PROCESSORS = 132  # of an H100 or H200
_LOG2_E = math.log2(math.e)
_NO_SUM = 1e-30  # in place of 0 where a part saw nothing: 0 / it is 0, and its logarithm finite


@dataclass(frozen=True)
class _Plan:
    """What is known of a launch before it is traced."""

    width: int  # entries of a row of the page table
    page_size: int
    parts: int  # programs that share a row
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None

    @property
    def piece(self) -> int:
        """Tokens of one copy: a page, or what a block takes of a longer one."""
        return min(self.page_size, _BLOCK)


def refusal(q: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    del page_table
    kv_heads, _, page_size, head_dim = k_pages.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k_pages.dtype != q.dtype:
        return f"q and pages must both be bfloat16 or float16, not {q.dtype} and {k_pages.dtype}"
    if page_size not in (8, 16, 32) and page_size % _BLOCK:
        return f"the page size must be 8, 16, 32 or a multiple of {_BLOCK}, not {page_size}"
    if head_dim not in (64, 128):
        return f"the head dim must be 64 or 128, not {head_dim}"
    if q.shape[1] // kv_heads > _ROWS:
        return f"a KV head may have at most {_ROWS} query heads, not {q.shape[1] // kv_heads}"
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
    parts: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.api.paged_attention`; arguments are taken as checked.

    Args:
      parts: how many programs share a row; None chooses.
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
    """
    rows, heads, head_dim = q.shape
    kv_heads, _, page_size, _ = k_pages.shape
    group = heads // kv_heads
    padding = -group % _TILE_ROWS
    width = page_table.shape[1]
    plan = _Plan(
        width=width,
        page_size=page_size,
        parts=parts or _parts(rows * kv_heads, pl.cdiv(width * page_size, _BLOCK)),
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
    )
    out_shape = (rows, kv_heads, plan.parts, group + padding, head_dim)
    out_dtype = q.dtype if plan.parts == 1 else jnp.float32
    kernel = plgpu.kernel(
        partial(_attend_part, plan),
        out_type=(
            jax.ShapeDtypeStruct(out_shape, out_dtype),
            jax.ShapeDtypeStruct(out_shape[:-1], jnp.float32),
        ),
        scratch_types=_scratch(plan, head_dim, q.dtype, out_dtype),
        grid=(rows, kv_heads, plan.parts),
        grid_names=("row", "head", "part"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    grouped = q.reshape(rows, kv_heads, group, head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, padding), (0, 0)))
    out, log_total = kernel(grouped, k_pages, v_pages, page_table, kv_lens)
    out, log_total = out[..., :group, :], log_total[..., :group]
    if plan.parts == 1:
        return out.reshape(rows, heads, head_dim)
    # Differences first: parts that saw nothing are equal, and far too low to be scaled exactly.
    weight = jnp.exp2(log_total - log_total.max(axis=2, keepdims=True))[..., None]
    out = (out * weight).sum(axis=2) / weight.sum(axis=2)  # [B, K, G, H]
    return out.reshape(rows, heads, head_dim).astype(q.dtype)


def _parts(programs: int, blocks: int) -> int:
    """Programs that share a row: as many as still run at once, one to a multiprocessor."""
    return max(1, min(_PROCESSORS // programs, blocks))


def _scratch(plan: _Plan, head_dim: int, dtype: Any, out_dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers, by `_attend_part`'s names for them."""

    def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
        """In the layout of the products: swizzled tiles of 8 rows of 128 bytes."""
        columns = 128 // jnp.dtype(dtype).itemsize
        tiles = plgpu.TilingTransform((_TILE_ROWS, columns))  # type: ignore[abstract]
        swizzle = plgpu.SwizzleTransform(128)  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=(tiles, swizzle))

    ring = tiled((_STAGES, _BLOCK, head_dim), dtype)
    full = plgpu.Barrier(num_arrivals=_BLOCK // plan.piece, num_barriers=_STAGES)
    free = plgpu.Barrier(num_arrivals=1, num_barriers=_STAGES)
    return {
        "q_tile": tiled((_ROWS, head_dim), dtype),
        "k_buffer": ring,
        "v_buffer": ring,
        "weights": tiled((_ROWS, _BLOCK), dtype),
        "out_tile": tiled((_ROWS, head_dim), out_dtype),
        "log_total": plgpu.SMEM((_ROWS,), jnp.float32),
        "q_full": plgpu.Barrier(),
        "k_full": full,
        "v_full": full,
        "k_free": free,
        "v_free": free,
    }


@dataclass(frozen=True)
class _Ring:
    """Pages of K or of V on their way through shared memory."""

    pages: Any  # [K, P, S, H], global
    buffer: Any  # [stages, C, H], shared
    full: Any  # barriers [stages]: the copies into a stage have arrived
    free: Any  # barriers [stages]: the product has read a stage


@dataclass(frozen=True)
class _Part:
    """The blocks of a row's pages that one program reads."""

    oldest: jax.Array  # position of the first visible token of the row
    kv_len: jax.Array  # position behind the last
    first: jax.Array  # block
    count: jax.Array  # of blocks


def _attend_part(
    plan: _Plan,
    q_ref: Any,  # [B, K, G, H]
    k_ref: Any,  # [K, P, S, H]
    v_ref: Any,  # [K, P, S, H]
    table_ref: Any,  # i32[B, W]
    lens_ref: Any,  # i32[B]
    out_ref: Any,  # [B, K, parts, G, H]
    log_total_ref: Any,  # [B, K, parts, G]
    *,
    q_tile: Any,
    k_buffer: Any,
    v_buffer: Any,
    weights: Any,
    out_tile: Any,
    log_total: Any,
    q_full: Any,
    k_full: Any,
    v_full: Any,
    k_free: Any,
    v_free: Any,
) -> None:
    row, head, part = (lax.axis_index(name) for name in ("row", "head", "part"))
    group = q_ref.shape[2]
    k = _Ring(k_ref, k_buffer, k_full, k_free)
    v = _Ring(v_ref, v_buffer, v_full, v_free)
    share = _share(plan, lens_ref[row], part)

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy_pages(plan, share, table_ref, row, head, (k, v))

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        # The rows of the tile past the group's stay undefined; no row of a product mixes them in.
        plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_tile.at[pl.ds(0, group)], q_full)
        plgpu.barrier_wait(q_full)
        out_tile[...], log_total[...] = _attend(plan, share, q_tile, k, v, weights, out_tile.dtype)
        plgpu.commit_smem()
        for tile, ref in ((out_tile, out_ref), (log_total, log_total_ref)):
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, group)], ref.at[row, head, part])
        plgpu.wait_smem_to_gmem(0)


def _share(plan: _Plan, kv_len: jax.Array, part: jax.Array) -> _Part:
    """Splits a row's blocks evenly; the last parts of a short row may get none."""
    window = plan.sliding_window
    oldest = jnp.int32(0) if window is None else jnp.maximum(kv_len - window, 0)
    start = lax.div(oldest, jnp.int32(_BLOCK))
    end = lax.div(kv_len + (_BLOCK - 1), jnp.int32(_BLOCK))
    each = lax.div(end - start + (plan.parts - 1), jnp.int32(plan.parts))
    first = start + part * each
    return _Part(oldest, kv_len, first, jnp.clip(end - first, 0, each))


def _copy_pages(
    plan: _Plan, share: _Part, table_ref: Any, row: jax.Array, head: jax.Array, rings: tuple
) -> None:
    @pl.loop(0, share.count)
    def _(i: jax.Array) -> None:
        stage = lax.rem(i, jnp.int32(_STAGES))
        for ring in rings:
            pl.when(i >= _STAGES)(partial(plgpu.barrier_wait, ring.free.at[stage]))
            for at in range(0, _BLOCK, plan.piece):
                token = (share.first + i) * _BLOCK + at
                entry = lax.div(token, jnp.int32(plan.page_size))
                # A block may reach past the table; what it reads there is masked.
                page = table_ref[row, jnp.minimum(entry, plan.width - 1)]
                start = pl.multiple_of(lax.rem(token, jnp.int32(plan.page_size)), plan.piece)
                plgpu.copy_gmem_to_smem(
                    ring.pages.at[head, page, pl.ds(start, plan.piece)],
                    ring.buffer.at[stage, pl.ds(at, plan.piece)],
                    ring.full.at[stage],
                )

    # Every arrival must be observed before the barriers go out of scope.
    for t in range(_STAGES):
        stage = lax.rem(share.count + t, jnp.int32(_STAGES))
        for ring in rings:
            used = share.count + t >= _STAGES
            pl.when(used)(partial(plgpu.barrier_wait, ring.free.at[stage]))


def _attend(
    plan: _Plan, share: _Part, q_tile: Any, k: _Ring, v: _Ring, weights: Any, out_dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Attention [64, H] over the part's tokens, and log2 [64] of the sum of its weights."""
    head_dim = q_tile.shape[1]
    wide, tall = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)

    def spread(x: jax.Array, columns: int) -> jax.Array:
        return lax.broadcast_in_dim(x, (_ROWS, columns), (0,))

    def visible(shape: tuple[int, int], axis: int, block: jax.Array) -> jax.Array:
        token = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=wide) + block * _BLOCK
        return (share.oldest <= token) & (token < share.kv_len)

    def step(i: jax.Array, seen: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weighted, highest, total = seen
        stage, block = lax.rem(i, jnp.int32(_STAGES)), share.first + i

        plgpu.barrier_wait(k.full.at[stage])
        scores = _product(q_tile, k.buffer.at[stage].transpose((1, 0)), _BLOCK)
        plgpu.barrier_arrive(k.free.at[stage])
        scores = jnp.where(visible((_ROWS, _BLOCK), 1, block), _base_two(plan, scores), MASKED)
        higher = jnp.maximum(highest, scores.max(axis=1))
        fade = jnp.exp2(highest - higher)
        weight = jnp.exp2(scores - spread(higher, _BLOCK))
        weights[...] = weight.astype(weights.dtype)
        plgpu.commit_smem()

        plgpu.barrier_wait(v.full.at[stage])
        ragged = (block * _BLOCK < share.oldest) | ((block + 1) * _BLOCK > share.kv_len)

        @pl.when(ragged)
        def _() -> None:
            # A weight of 0 does not silence a NaN, and unread memory may hold one.
            rows = v.buffer[stage]
            shown = visible((_BLOCK, head_dim), 0, block)
            v.buffer[stage] = jnp.where(shown, rows, jnp.zeros_like(rows))
            plgpu.commit_smem()

        values = _product(weights, v.buffer.at[stage], head_dim)
        plgpu.barrier_arrive(v.free.at[stage])
        return (
            weighted * spread(fade, head_dim) + values,
            higher,
            total * fade + weight.sum(axis=1),
        )

    nothing = (
        plgpu.layout_cast(jnp.zeros((_ROWS, head_dim), jnp.float32), wide),
        plgpu.layout_cast(jnp.full((_ROWS,), LOWEST, jnp.float32), tall),
        plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), tall),
    )
    weighted, highest, total = lax.fori_loop(0, share.count, step, nothing)
    total = jnp.maximum(total, _NO_SUM)
    out = (weighted / spread(total, head_dim)).astype(out_dtype)
    return out, highest + jnp.log(total) * _LOG2_E


def _product(a: Any, b: Any, columns: int) -> jax.Array:
    """float32[64, columns] of two tiles in shared memory."""

    def multiply(into: Any) -> jax.Array:
        plgpu.wgmma(into, a, b)
        return into[...]

    into = plgpu.ACC((_ROWS, columns), jnp.float32)  # type: ignore[attr-defined]
    return pl.run_scoped(multiply, into)


def _base_two(plan: _Plan, scores: jax.Array) -> jax.Array:
    """Scores whose exp2 is what exp is of the scaled and capped ones."""
    cap = plan.logit_soft_cap
    if cap is None:
        return scores * (plan.scale * _LOG2_E)
    return jnp.tanh(scores * (plan.scale / cap)) * (cap * _LOG2_E)
