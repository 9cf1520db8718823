"""What a block of threads of decode attention does on Hopper GPUs: one warpgroup copies pages into
the rings, one or two compute; over quantised pages as `mosaic_gpu_scaled` says.

From one block of tokens to the next the softmax is a chain of steps that each wait for the one
before: a program that has more to do than others, or the chip to itself, is held up by that rather
than by memory. A second warpgroup then takes every other block of the same piece of work, and hands
what it has seen to the first, which begins and ends the piece.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import LOG2_E, ROWS, Rings, base_two, iota, product, spread, tiled
from pallas_kernels.online_softmax import LOWEST, MASKED
from pallas_kernels.paged_attention import mosaic_gpu_scaled
from pallas_kernels.paged_attention.mosaic_gpu_rows import Rows, put
from pallas_kernels.paged_attention.mosaic_gpu_work import (
    BLOCK,
    NO_SUM,
    REDUCTION_BYTES,
    Plan,
    Refs,
    Work,
    each_block,
    each_work,
)


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
        readers=plan.readers,
    )
    scratch = {
        **rings,
        "rows": plgpu.SMEM((plan.slots, ROWS, plan.head_dim), dtype),
        "q_tile": tiled((ROWS, plan.head_dim), dtype),
        "weights": tiled((plan.readers, ROWS, BLOCK), dtype),
        "rows_full": plgpu.Barrier(num_barriers=plan.slots),
    }
    if plan.parts > 1 or plan.readers > 1:
        scratch["columns"] = plgpu.SMEM((ROWS, plan.out_columns), jnp.float32)
        scratch["numbers"] = plgpu.SMEM((2, ROWS), jnp.float32)
    if plan.readers > 1:
        scratch |= {name: plgpu.Barrier() for name in ("ready", "handed_over", "taken_over")}
    return scratch


def body(plan: Plan, loaded: Any, k_pages: Any, v_pages: Any, *refs: Any, **scratch: Any) -> None:
    """The program of one block of threads.

    Args:
      loaded, k_pages, v_pages, refs: the launch's operands in the order of `Refs`, pools in the
        place of rings, and their scales behind them if they have any; then its results.
      scratch: see `scratch_types`.
    """
    scales, refs = (refs[:2], refs[2:]) if plan.scaled else ((), refs)
    given = 2 + (plan.by_length is not None) + 3 * plan.append
    (table, lens, *rest), outputs = refs[:given], refs[given:]
    cut = None if plan.by_length is None else rest.pop(0)
    rings = Rings.take(k_pages, v_pages, scratch, scales)
    operands = Refs(loaded, table, lens, rings, cut, *rest)
    compute = mosaic_gpu_scaled.compute if plan.scaled else _compute

    def second() -> None:
        plgpu.set_max_registers(232, action="increase")
        if plan.scaled:
            mosaic_gpu_scaled.help_compute(plan, operands, **scratch)
        else:
            _help(plan, operands, _Shared(**scratch))

    warpgroup = lax.axis_index("warpgroup")
    if plan.readers > 1 and plan.scaled:
        # Mosaic (of JAX 0.11.2) reduces across warps through shared memory behind what is in use
        # where the reduction is traced. Two warpgroups at once need two such places.
        pl.run_scoped(
            lambda _: pl.when(warpgroup == 1)(second),
            plgpu.SMEM((2 * REDUCTION_BYTES,), jnp.int8),
            collective_axes="warpgroup",
        )
    elif plan.readers > 1:
        pl.when(warpgroup == 1)(second)

    @pl.when(warpgroup == plan.readers)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy_pages(plan, operands)

    @pl.when(warpgroup == 0)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
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


# The warpgroups that compute.


@dataclass(frozen=True)
class _Shared:
    """Shared memory and barriers beside the rings; see `scratch_types`."""

    rows: Any  # [slots, 64, H]: what a piece of work begins with, in the end its result
    q_tile: Any  # [64, H], as a product takes it
    weights: Any  # [readers, 64, C], likewise
    rows_full: Any  # barriers [slots]
    columns: Any = None  # f32[64, columns], of what goes from one to the other, or out as a part
    numbers: Any = None  # f32[2, 64], likewise
    ready: Any = None  # barrier: `q_tile` is there, and what was handed over has been read
    handed_over: Any = None  # barrier: `columns` are there, with the first of them `numbers`, too
    taken_over: Any = None  # barrier: `columns` have been read


def _compute(plan: Plan, refs: Refs, outputs: tuple[Any, ...], **scratch: Any) -> None:
    """Every piece of work of a program, into `outputs`."""
    shared = _Shared(**scratch)
    begun = Rows(plan, refs, shared.rows, shared.rows_full)
    weights = shared.weights.at[0]

    def compute_work(work: Work, steps: jax.Array, mine: Any) -> None:
        q_tile = shared.q_tile
        q_tile[...] = plgpu.load(mine, layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.commit_smem()
        if plan.readers > 1:
            if plan.parts > 1:  # the last part's columns leave before the other reader writes there
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(shared.ready)
        seen = _begin(plan, work, q_tile, weights)
        if plan.append:
            begun.store_new(work, mine)
        seen = _attend(plan, refs, work, steps, q_tile, weights, seen, 0)
        if plan.readers > 1:
            seen = _take_over(plan, shared, seen)
        total = jnp.maximum(seen.total, NO_SUM)
        out = [x / spread(total, x.shape[1]) for x in seen.weighted]
        whole = partial(_store_whole, plan, work, outputs, out, mine)
        log_sum = seen.highest + jnp.log(total) * LOG2_E
        part = partial(_store_part, plan, work, outputs, out, log_sum, shared)
        if plan.by_length is not None:
            pl.when(work.parts == 1)(whole)
            pl.when(work.parts > 1)(part)
        else:
            (whole if plan.parts == 1 else part)()

    begun.each(compute_work)
    plgpu.wait_smem_to_gmem(0)


def _help(plan: Plan, refs: Refs, shared: _Shared) -> None:
    """The second warpgroup's share of every piece of work."""

    def help_with(n: jax.Array, work: Work, steps: jax.Array) -> None:
        del n
        plgpu.barrier_wait(shared.ready)
        weights, seen = shared.weights.at[1], _nothing(plan)
        _hand_over(plan, shared, _attend(plan, refs, work, steps, shared.q_tile, weights, seen, 1))

    each_work(plan, refs, help_with)


def _hand_over(plan: Plan, shared: _Shared, seen: _Seen) -> None:
    """A few columns at a time."""
    [weighted] = seen.weighted
    shared.numbers[0] = seen.highest
    shared.numbers[1] = seen.total
    for start in range(0, plan.head_dim, plan.out_columns):
        if start:
            plgpu.barrier_wait(shared.taken_over)
        shared.columns[...] = weighted[:, start : start + plan.out_columns]
        plgpu.barrier_arrive(shared.handed_over)


def _take_over(plan: Plan, shared: _Shared, seen: _Seen) -> _Seen:
    """What both have seen."""
    tall = plgpu.Layout.WGMMA.reduce(1)
    [weighted] = seen.weighted
    plgpu.barrier_wait(shared.handed_over)
    highest, total = (
        plgpu.load(shared.numbers.at[i], layout=tall, optimized=False) for i in range(2)
    )
    higher = jnp.maximum(seen.highest, highest)
    fade, other_fade = jnp.exp2(seen.highest - higher), jnp.exp2(highest - higher)
    both = []
    for start in range(0, plan.head_dim, plan.out_columns):
        if start:
            plgpu.barrier_wait(shared.handed_over)
        other = plgpu.load(shared.columns, layout=plgpu.Layout.WGMMA, optimized=False)
        if start + plan.out_columns < plan.head_dim:
            plgpu.barrier_arrive(shared.taken_over)
        mine = weighted[:, start : start + plan.out_columns]
        columns = plan.out_columns
        both.append(mine * spread(fade, columns) + other * spread(other_fade, columns))
    joined = both[0] if len(both) == 1 else jnp.concatenate(both, axis=1)
    return _Seen((joined,), higher, seen.total * fade + total * other_fade)


def _nothing(plan: Plan) -> _Seen:
    """The running softmax before anything has been seen."""
    wide, tall = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    return _Seen(
        weighted=tuple(
            plgpu.layout_cast(jnp.zeros((ROWS, at.stop - at.start), jnp.float32), wide)
            for at in plan.columns
        ),
        highest=plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), tall),
        total=plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), tall),
    )


def _begin(plan: Plan, work: Work, q_tile: Any, weights: Any) -> _Seen:
    """The running softmax before the first block. With `append` the first part has seen the new
    token, whose K and V are rows of `q_tile`: products with the tile itself find its score, and its
    V times a weight of 1."""
    nothing = _nothing(plan)
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
    reader: int,
) -> _Seen:
    """What has been seen after this reader's blocks of `work`."""
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

    return each_block(plan, refs.rings, work, steps, reader, step, seen)


def _store_whole(
    plan: Plan, work: Work, outputs: tuple[Any, ...], out: list[jax.Array], rows: Any
) -> None:
    """The result, over the rows that the work began with."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the new K and V
    for columns, x in zip(plan.columns, out, strict=True):
        put(rows, columns.start, x)
    plgpu.commit_smem()
    result = rows.at[pl.ds(0, plan.group)]
    plgpu.copy_smem_to_gmem(result, outputs[-1].at[work.row, work.head])


def _store_part(
    plan: Plan,
    work: Work,
    outputs: tuple[Any, ...],
    out: list[jax.Array],
    log_sum: jax.Array,
    shared: _Shared,
) -> None:
    """A part's float32 result, a few columns at a time."""
    at_part = (work.row, work.head, work.part)
    for columns, x in zip(plan.columns, out, strict=True):
        for start in range(0, x.shape[1], plan.out_columns):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            shared.columns[...] = x[:, start : start + plan.out_columns]
            if columns.start + start == 0:
                shared.numbers[0] = log_sum
            plgpu.commit_smem()
            at = pl.ds(columns.start + start, plan.out_columns)
            result = outputs[0].at[(*at_part, slice(None), at)]
            plgpu.copy_smem_to_gmem(shared.columns.at[pl.ds(0, plan.group)], result)
    padded = pl.ds(0, plan.group + plan.padding)
    plgpu.copy_smem_to_gmem(shared.numbers.at[0, padded], outputs[1].at[at_part])


def _base_two(plan: Plan, scores: jax.Array) -> jax.Array:
    return base_two(scores, plan.scale, plan.logit_soft_cap)
