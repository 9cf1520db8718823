"""rope_and_write as a Mosaic kernel for Hopper GPUs: one pass over qkv, for prefill.

A program takes 64 tokens of two rows of a KV head: K and V, or two query heads. (If their number is
odd, the last program takes the last one and K, which it does not use.) The tensor memory
accelerator loads and stores the rows; both loads start before the first row is rotated, and two
other programs of the same processor keep memory busy meanwhile. K and V go to their pages 8 tokens
at a time where 8 tokens have neighbouring slots, and one by one elsewhere.

Tests interpret and lower the kernel; `pallas_kernels.check` runs it where there is a GPU.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.finite import finite_below, guarded
from pallas_kernels.hopper import ROWS, spread

_RUN = 8  # tokens of one copy to a page
_HELD = 2  # rows of a program
_TILE_COLUMNS = 64  # most columns of a tile: 128 bytes


@dataclass(frozen=True)
class _Plan:
    """The static parameters of a launch."""

    tokens: int
    kv_heads: int
    rows: int  # J
    head_dim: int
    page_size: int

    @property
    def group(self) -> int:
        """Number of query heads of a KV head."""
        return self.rows - 2

    @property
    def tiles(self) -> int:
        """Number of tiles of 64 tokens."""
        return pl.cdiv(self.tokens, ROWS)


def refusal(qkv: jax.Array, k_pages: jax.Array, slot_mapping: jax.Array) -> str | None:
    """Say why the kernel does not take these arguments, or return None."""
    del slot_mapping
    head_dim = qkv.shape[-1]
    if qkv.dtype != jnp.bfloat16 or k_pages.dtype != qkv.dtype:
        return f"qkv and pages must both be bfloat16, not {qkv.dtype} and {k_pages.dtype}"
    if head_dim not in (64, 128):
        return f"the head dim must be 64 or 128, not {head_dim}"
    return None


def rope_and_write(
    qkv: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slot_mapping: jax.Array,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.kv_write.api.rope_and_write`; arguments are already checked.

    Args:
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
    """
    tokens, kv_heads, rows, head_dim = qkv.shape
    plan = _Plan(tokens, kv_heads, rows, head_dim, k_pages.shape[2])
    # Prefill batches are whole tiles already, so this pads none of them.
    padding = -tokens % ROWS
    qkv, scale, cos, sin, slots = (
        jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))) if padding else x
        for x in (qkv, scale, cos, sin, slot_mapping)
    )
    biases = () if bias is None else (bias.astype(jnp.float32),)
    runs = _runs(plan, slots)
    operands = (qkv, scale, cos, sin, slots, runs, *biases)
    q, k_pages, v_pages = _launch(plan, interpret, k_pages, v_pages, *operands)
    return q[:tokens], k_pages, v_pages


def _runs(plan: _Plan, slots: jax.Array) -> jax.Array:
    """Return i32[tiles * 64 / 8]: for each 8 tokens the first slot, if they go to consecutive slots
    of one page, else -1.

    Every layer of a model needs the same runs; XLA computes them once.
    """
    groups = slots.reshape(-1, _RUN)
    first = groups[:, :1]
    in_a_row = (groups == first + jnp.arange(_RUN, dtype=jnp.int32)).all(axis=1)
    in_a_page = first[:, 0] % plan.page_size + _RUN <= plan.page_size
    whole = jnp.arange(1, len(groups) + 1) * _RUN <= plan.tokens
    return jnp.where(in_a_row & in_a_page & whole, first[:, 0], -1)


@partial(jax.jit, static_argnums=(0, 1))
def _launch(
    plan: _Plan, interpret: Any, k_pages: jax.Array, v_pages: jax.Array, *operands: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Launch the kernel. It is jitted so that a model's layers share one lowering."""
    dtype = k_pages.dtype
    # References, so that the kernel writes into the given pools.
    pools = jax.new_ref(k_pages), jax.new_ref(v_pages)
    columns = min(plan.head_dim // 2, _TILE_COLUMNS)
    tiling = plgpu.TilingTransform((8, columns))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(2 * columns)  # type: ignore[abstract]
    loaded = (_HELD, ROWS, plan.head_dim)
    kernel = plgpu.kernel(
        partial(_body, plan),
        out_type=jax.ShapeDtypeStruct(
            (plan.tiles * ROWS, plan.kv_heads * plan.group, plan.head_dim), dtype
        ),
        scratch_types={
            "loaded": plgpu.SMEM(loaded, dtype, transforms=(tiling, swizzle)),
            "new": plgpu.SMEM((2, ROWS, plan.head_dim), dtype),
            "arrived": plgpu.Barrier(num_barriers=_HELD),
        },
        grid=(plan.tiles, plan.kv_heads, 1 + pl.cdiv(plan.group, _HELD)),
        grid_names=("tile", "head", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="rope_and_write",
    )
    q = kernel(*pools, *operands)
    return q, jax.freeze(pools[0]), jax.freeze(pools[1])


def _body(
    plan: _Plan,
    k_pages: Any,  # [K, P, S, H]
    v_pages: Any,
    qkv: Any,  # [T, K, J, H]
    scale: Any,  # f32[T]
    cos: Any,  # f32[T, H/2]
    sin: Any,
    slots: Any,  # i32[T]
    runs: Any,  # i32[T / 8]
    *rest: Any,  # bias, f32[K, J, H], if there is one; q, [T, N, H]
    loaded: Any,  # [2, 64, H], tiled
    new: Any,  # [2, 64, H], K and V as rows
    arrived: Any,  # barriers [2]
) -> None:
    *bias, q = rest
    head, part = lax.axis_index("head"), lax.axis_index("part")
    start = pl.multiple_of(lax.axis_index("tile") * ROWS, ROWS)
    tokens = pl.ds(start, ROWS)
    first = jnp.where(part == 0, plan.group, (part - 1) * _HELD)
    for i in range(_HELD):
        plgpu.copy_gmem_to_smem(qkv.at[tokens, head, first + i], loaded.at[i], arrived.at[i])
    wide, half = plgpu.Layout.WGMMA, plan.head_dim // 2
    angles = [plgpu.load(ref.at[tokens], layout=wide, optimized=False) for ref in (cos, sin)]
    factor = plgpu.load(scale.at[tokens], layout=wide.reduce(1), optimized=False)

    def scaled(i: int, at: int) -> jax.Array:
        """Scale and shift H/2 columns of a loaded row, from column `at` on: float32[64, H/2]."""
        columns = pl.ds(at, half)
        shift = [x.at[head, first + i, columns] for x in bias]
        return _scaled(loaded.at[i, :, columns], factor, shift)

    def turned(i: int) -> list[tuple[int, jax.Array]]:
        """Rotate a loaded row; return the first column and float32[64, H/2] of each half."""
        a, b = scaled(i, 0), scaled(i, half)
        a, b = a * angles[0] - b * angles[1], b * angles[0] + a * angles[1]
        return [(0, a), (half, b)]

    @pl.when(part == 0)
    def _() -> None:
        below = finite_below(new.dtype)
        plgpu.barrier_wait(arrived.at[0])
        plgpu.barrier_wait(arrived.at[1])
        for at, k in turned(0):
            k, v = guarded(k, scaled(1, at), below)
            _put(new.at[0], at, k)
            _put(new.at[1], at, v)
        plgpu.commit_smem()
        for i, pages in enumerate((k_pages, v_pages)):
            _store(plan, new.at[i], pages.at[head], start, slots, runs)

    @pl.when(part > 0)
    def _() -> None:
        for i in range(_HELD):
            plgpu.barrier_wait(arrived.at[i])
            for at, x in turned(i):
                loaded[i, :, pl.ds(at, half)] = x.astype(loaded.dtype)
            plgpu.commit_smem()

            @pl.when(plan.group % _HELD == 0 or first + i < plan.group)
            def _(i: int = i) -> None:
                plgpu.copy_smem_to_gmem(loaded.at[i], q.at[tokens, head * plan.group + first + i])

    plgpu.wait_smem_to_gmem(0)


def _scaled(rows: Any, factor: jax.Array, bias: list[Any]) -> jax.Array:
    """Return rows in shared memory, times factor f32[64], plus each bias f32[columns], as
    float32[64, columns]."""
    wide = plgpu.Layout.WGMMA
    x = plgpu.load(rows, layout=wide).astype(jnp.float32)
    x = x * spread(factor, x.shape[1])
    for ref in bias:
        one = plgpu.load(ref, layout=wide.reduce(0), optimized=False)
        x = x + lax.broadcast_in_dim(one, x.shape, (1,))
    return x


def _put(rows: Any, start: int, x: jax.Array) -> None:
    """Set rows[:, start : start + columns] = x [64, columns], 8 columns at a time.

    Mosaic infers the tiling of shared memory from its slices. From slices of 16 columns or more it
    infers tiles of one row, which it miscompiles (JAX 0.11.2).
    """
    for at in range(0, x.shape[1], 8):
        rows[:, pl.ds(start + at, 8)] = x[:, at : at + 8].astype(rows.dtype)


def _store(plan: _Plan, rows: Any, pages: Any, start: jax.Array, slots: Any, runs: Any) -> None:
    """Write the tile's rows [64, H] to their slots in `pages` [P, S, H]."""

    def copy(at: jax.Array, slot: jax.Array, count: int) -> None:
        page = lax.div(slot, jnp.int32(plan.page_size))
        offset = lax.rem(slot, jnp.int32(plan.page_size))
        target = pages.at[page, pl.ds(offset, count)]
        plgpu.copy_smem_to_gmem(rows.at[pl.ds(at, count)], target)

    @pl.loop(0, ROWS // _RUN)
    def _(i: jax.Array) -> None:
        run = runs[lax.div(start, jnp.int32(_RUN)) + i]

        @pl.when(run >= 0)
        def _() -> None:
            copy(i * _RUN, run, _RUN)

        @pl.when(run < 0)
        def _() -> None:
            @pl.loop(i * _RUN, jnp.minimum((i + 1) * _RUN, plan.tokens - start))
            def _(at: jax.Array) -> None:
                copy(at, slots[start + at], 1)
