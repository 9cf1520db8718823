"""What a block of threads of decode attention does on Hopper GPUs: one warpgroup copies pages into
the rings, one computes; over quantised pages as `mosaic_gpu_scaled` says."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import (
    LOG2_E,
    ROWS,
    Rings,
    base_two,
    iota,
    one_of,
    product,
    spread,
    tiled,
)
from pallas_kernels.online_softmax import LOWEST, MASKED
from pallas_kernels.paged_attention import mosaic_gpu_scaled
from pallas_kernels.paged_attention.mosaic_gpu_rows import Rows, put
from pallas_kernels.paged_attention.mosaic_gpu_work import (
    BLOCK,
    NO_SUM,
    Plan,
    Refs,
    Work,
    each_work,
)

_OUT_COLUMNS = 64  # of a float32 result on its way out: shared memory is full of pages


def scratch_types(plan: Plan, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers, by `body`'s names for them."""
    if plan.scaled:
        return mosaic_gpu_scaled.scratch_types(plan, dtype)
    rings = Rings.scratch(
        dtype,
        stages=plan.stages,
        block=BLOCK,
        head_dim=plan.head_dim,
        page_size=plan.page_size,
        readers=1,
    )
    scratch = {
        **rings,
        "rows": plgpu.SMEM((plan.slots, ROWS, plan.head_dim), dtype),
        "q_tile": tiled((ROWS, plan.head_dim), dtype),
        "weights": tiled((ROWS, BLOCK), dtype),
        "rows_full": plgpu.Barrier(num_barriers=plan.slots),
    }
    if plan.parts > 1:
        scratch["out_tile"] = plgpu.SMEM((ROWS, _OUT_COLUMNS), jnp.float32)
        scratch["log_total"] = plgpu.SMEM((ROWS,), jnp.float32)
    return scratch


def body(plan: Plan, loaded: Any, k_pages: Any, v_pages: Any, *refs: Any, **scratch: Any) -> None:
    """The program of one block of threads.

    Args:
      loaded, k_pages, v_pages, refs: the launch's operands in the order of `Refs`, pools in the
        place of rings, and their scales behind them if they have any; then its results.
      scratch: see `scratch_types`.
    """
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    if plan.scaled:
        pair = lax.rem(warpgroup, jnp.int32(plan.pairs))
        program = program * plan.pairs + pair
        scratch = {name: one_of(plan.pairs, each, pair) for name, each in scratch.items()}
    scales, refs = (refs[:2], refs[2:]) if plan.scaled else ((), refs)
    inputs, outputs = (refs[:5], refs[5:]) if plan.append else (refs[:2], refs[2:])
    table, lens, *rest = inputs
    rings = Rings.take(k_pages, v_pages, scratch, scales)
    operands = Refs(program, loaded, table, lens, rings, *rest)
    compute = mosaic_gpu_scaled.compute if plan.scaled else _compute

    @pl.when(warpgroup >= plan.pairs)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy_pages(plan, operands)

    @pl.when(warpgroup < plan.pairs)
    def _() -> None:
        plgpu.set_max_registers(232 if plan.pairs == 1 else 216, action="increase")
        compute(plan, operands, outputs, **scratch)


class _Seen(NamedTuple):
    """The running softmax of a piece of work, float32."""

    weighted: tuple[jax.Array, ...]  # of [64, columns]: the sum of weight * value
    highest: jax.Array  # [64], base-2 score
    total: jax.Array  # [64], the sum of weights


# The warpgroup that copies.


def _copy_pages(plan: Plan, refs: Refs) -> None:
    def copy_work(n: jax.Array, work: Work, steps: jax.Array) -> None:
        del n

        def page_of(entry: jax.Array) -> jax.Array:
            return refs.table[work.row, jnp.minimum(entry, plan.width - 1)]

        refs.rings.copy(work.head, work.first, work.count, steps, page_of)

    refs.rings.drain(each_work(plan, refs, copy_work))


# The warpgroup that computes.


def _compute(
    plan: Plan,
    refs: Refs,
    outputs: tuple[Any, ...],
    *,
    rows: Any,  # [slots, 64, H]: what a piece of work begins with, in the end its result
    q_tile: Any,  # [64, H], as a product takes it
    weights: Any,  # [64, C], likewise
    rows_full: Any,  # barriers [slots]
    out_tile: Any = None,  # f32[64, columns]
    log_total: Any = None,  # f32[64]
) -> None:
    begun = Rows(plan, refs, rows, rows_full)

    def compute_work(work: Work, steps: jax.Array, mine: Any) -> None:
        q_tile[...] = plgpu.load(mine, layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.commit_smem()
        seen = _begin(plan, work, q_tile, weights)
        if plan.append:
            begun.store_new(work, mine)
        weighted, highest, total = _attend(plan, refs, work, steps, q_tile, weights, seen)
        total = jnp.maximum(total, NO_SUM)
        out = [x / spread(total, x.shape[1]) for x in weighted]
        if plan.parts == 1:
            _store_whole(plan, work, outputs, out, mine)
        else:
            log_total[...] = highest + jnp.log(total) * LOG2_E
            _store_part(plan, work, outputs, out, out_tile, log_total)

    begun.each(compute_work)
    plgpu.wait_smem_to_gmem(0)


def _begin(plan: Plan, work: Work, q_tile: Any, weights: Any) -> _Seen:
    """The running softmax before the first block. With `append` the first part has seen the new
    token, whose K and V are rows of `q_tile`: products with the tile itself find its score, and its
    V times a weight of 1."""
    wide, tall = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    nothing = _Seen(
        weighted=tuple(
            plgpu.layout_cast(jnp.zeros((ROWS, at.stop - at.start), jnp.float32), wide)
            for at in plan.columns
        ),
        highest=plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), tall),
        total=plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), tall),
    )
    if not plan.append:
        return nothing
    column = iota((ROWS, BLOCK), 1)
    mine = jnp.full((ROWS, BLOCK), (work.part == 0) & (work.kv_len > 0))
    scores = _base_two(plan, product(q_tile, q_tile.transpose((1, 0)), BLOCK))
    scores = jnp.where(mine & (column == plan.group), scores, MASKED)
    weight = jnp.where(
        mine & (column == plan.group + 1), jnp.ones_like(scores), jnp.zeros_like(scores)
    )
    weights[...] = weight.astype(weights.dtype)
    plgpu.commit_smem()
    return _Seen(
        weighted=tuple(
            product(weights, q_tile.at[:, at], at.stop - at.start) for at in plan.columns
        ),
        highest=jnp.maximum(scores.max(axis=1), nothing.highest),
        total=weight.sum(axis=1),
    )


def _attend(
    plan: Plan,
    refs: Refs,
    work: Work,
    steps: jax.Array,
    q_tile: Any,
    weights: Any,
    seen: _Seen,
) -> _Seen:
    """What has been seen after the blocks of `work`."""
    k, v = refs.rings.k, refs.rings.v

    def visible(shape: tuple[int, int], axis: int, block: jax.Array) -> jax.Array:
        token = iota(shape, axis) + block * BLOCK
        return (work.oldest <= token) & (token < work.end)

    def step(i: jax.Array, seen: _Seen) -> _Seen:
        stage, block = lax.rem(steps + i, jnp.int32(plan.stages)), work.first + i

        plgpu.barrier_wait(k.full.at[stage])
        scores = product(q_tile, k.buffer.at[stage].transpose((1, 0)), BLOCK)
        plgpu.barrier_arrive(k.free.at[stage])
        scores = jnp.where(visible((ROWS, BLOCK), 1, block), _base_two(plan, scores), MASKED)
        higher = jnp.maximum(seen.highest, scores.max(axis=1))
        fade = jnp.exp2(seen.highest - higher)
        weight = jnp.exp2(scores - spread(higher, BLOCK))
        weights[...] = weight.astype(weights.dtype)
        plgpu.commit_smem()
        total = seen.total * fade + weight.sum(axis=1)

        plgpu.barrier_wait(v.full.at[stage])
        ragged = (block * BLOCK < work.oldest) | ((block + 1) * BLOCK > work.end)

        @pl.when(ragged)
        def _() -> None:
            # A weight of 0 does not silence a NaN, and unread memory may hold one.
            rows = v.buffer[stage]
            shown = visible((BLOCK, plan.head_dim), 0, block)
            v.buffer[stage] = jnp.where(shown, rows, jnp.zeros_like(rows))
            plgpu.commit_smem()

        weighted = tuple(
            x * spread(fade, x.shape[1]) + product(weights, v.buffer.at[stage, :, at], x.shape[1])
            for x, at in zip(seen.weighted, plan.columns, strict=True)
        )
        plgpu.barrier_arrive(v.free.at[stage])
        return _Seen(weighted, higher, total)

    return lax.fori_loop(0, work.count, step, seen)


def _store_whole(
    plan: Plan, work: Work, outputs: tuple[Any, ...], out: list[jax.Array], rows: Any
) -> None:
    """The result, over the rows that the work began with."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the new K and V
    for columns, x in zip(plan.columns, out, strict=True):
        put(rows, columns.start, x)
    plgpu.commit_smem()
    result = rows.at[pl.ds(0, plan.group)]
    plgpu.copy_smem_to_gmem(result, outputs[0].at[work.row, work.head])


def _store_part(
    plan: Plan,
    work: Work,
    outputs: tuple[Any, ...],
    out: list[jax.Array],
    out_tile: Any,
    log_total: Any,
) -> None:
    """A part's float32 result, a few columns at a time."""
    place = (work.row, work.head, work.part)
    for columns, x in zip(plan.columns, out, strict=True):
        for start in range(0, x.shape[1], _OUT_COLUMNS):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_tile[...] = x[:, start : start + _OUT_COLUMNS]
            plgpu.commit_smem()
            at = pl.ds(columns.start + start, _OUT_COLUMNS)
            result = outputs[0].at[(*place, slice(None), at)]
            plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, plan.group)], result)
    padded = pl.ds(0, plan.group + plan.padding)
    plgpu.copy_smem_to_gmem(log_total.at[padded], outputs[1].at[place])


def _base_two(plan: Plan, scores: jax.Array) -> jax.Array:
    return base_two(scores, plan.scale, plan.logit_soft_cap)
