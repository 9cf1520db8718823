"""The program of a block of threads of decode attention on Hopper GPUs: one warpgroup copies pages
into the rings, another computes. `mosaic_gpu_scaled` computes over quantised pages."""

from functools import partial
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
    accumulate,
    base_two,
    iota,
    product,
    spread,
    tiled,
)
from pallas_kernels.online_softmax import LOWEST, MASKED
from pallas_kernels.paged_attention import mosaic_gpu_scaled
from pallas_kernels.paged_attention.mosaic_gpu_plan import BLOCK, REDUCTION_BYTES, Plan
from pallas_kernels.paged_attention.mosaic_gpu_rows import Rows, put
from pallas_kernels.paged_attention.mosaic_gpu_work import (
    NO_SUM,
    Blocks,
    Refs,
    Turn,
    Work,
    each_work,
)


def scratch_types(plan: Plan, dtype: Any) -> dict[str, Any]:
    """Allocate shared memory and barriers, by the names that `body` expects."""
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
    scratch = rings | Rows.scratch(plan, dtype) | {"q_tile": tiled((ROWS, plan.head_dim), dtype)}
    if not plan.weights_in_registers:
        scratch["weights_tile"] = tiled((ROWS, BLOCK), dtype)
    if plan.parts > 1:
        scratch["columns"] = plgpu.SMEM((ROWS, plan.out_columns), jnp.float32)
        scratch["log_total"] = plgpu.SMEM((ROWS,), jnp.float32)
    return scratch


def body(plan: Plan, loaded: Any, k_pages: Any, v_pages: Any, *refs: Any, **scratch: Any) -> None:
    """Run the program of one block of threads.

    Args:
      loaded, k_pages, v_pages, refs: the launch's operands in the order of `Refs`, with pools in
        place of rings and their scales, if any, behind them; then its results.
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
        mosaic_gpu_scaled.help_compute(plan, operands, **scratch)

    warpgroup = lax.axis_index("warpgroup")
    if plan.readers > 1:
        # Mosaic (JAX 0.11.2) reduces across warps through shared memory behind the memory that is
        # in use where the reduction is traced. Two warpgroups that reduce at once need two places.
        # While the second is traced, this allocation is in use; only the first one reduces in it.
        pl.run_scoped(
            lambda _: pl.when(warpgroup == 1)(second),
            plgpu.SMEM((REDUCTION_BYTES,), jnp.int8),
            collective_axes="warpgroup",
        )

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

    weighted: jax.Array  # [64, H], the sum of weight * value
    highest: jax.Array  # [64], base-2 score
    total: jax.Array  # [64], the sum of weights


# The warpgroup that copies.


def _copy_pages(plan: Plan, refs: Refs) -> None:
    def copy_work(turn: Turn) -> None:
        work = turn.work

        def page_of(entry: jax.Array) -> jax.Array:
            return refs.table[work.row, jnp.minimum(entry, plan.width - 1)]

        refs.rings.copy(work.head, work.first, work.count, turn.steps, page_of)

    refs.rings.drain(each_work(plan, refs, copy_work))


# The warpgroup that computes.


def _compute(
    plan: Plan,
    refs: Refs,
    outputs: tuple[Any, ...],
    *,
    q_tile: Any,  # [64, H], in the layout of products
    weights_tile: Any = None,  # [64, C], likewise, if weights go through shared memory
    columns: Any = None,  # f32[64, columns], a part's result before it is stored
    log_total: Any = None,  # f32[64], likewise
    **scratch: Any,  # scratch of `Rows`; its slots take the results in the end
) -> None:
    """Compute every piece of work of a program and store the results in `outputs`."""
    begun = Rows.take(plan, refs, scratch, tile=q_tile)
    weights = _Weights(plan, weights_tile)

    def compute_work(work: Work, steps: jax.Array, row_slot: Any) -> None:
        seen = _begin(plan, work, q_tile, weights)
        if plan.append:
            begun.store_new(work, row_slot)
        seen = _attend(plan, refs, work, steps, q_tile, weights, seen)
        total = jnp.maximum(seen.total, NO_SUM)
        out = seen.weighted / spread(total, plan.head_dim)
        whole = partial(_store_whole, plan, work, outputs, out, row_slot)
        log_sum = seen.highest + jnp.log(total) * LOG2_E
        part = partial(_store_part, plan, work, outputs, out, log_sum, columns, log_total)
        if plan.by_length is not None:
            pl.when(work.parts == 1)(whole)
            pl.when(work.parts > 1)(part)
        else:
            (whole if plan.parts == 1 else part)()

    begun.each(compute_work)
    plgpu.wait_smem_to_gmem(0)


def _nothing(plan: Plan) -> _Seen:
    """Return the running softmax before the first key."""
    wide, row_layout = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    return _Seen(
        weighted=plgpu.layout_cast(jnp.zeros((ROWS, plan.head_dim), jnp.float32), wide),
        highest=plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), row_layout),
        total=plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout),
    )


def _begin(plan: Plan, work: Work, q_tile: Any, weights: "_Weights") -> _Seen:
    """Return the running softmax before the first block. With `append` the first part has seen the
    new token, with K and V as rows of `q_tile`: products with the tile itself give its score, and
    its V times a weight of 1."""
    nothing = _nothing(plan)
    if not plan.append:
        return nothing
    column = iota((ROWS, BLOCK), 1)
    has_new = jnp.full((ROWS, BLOCK), (work.part == 0) & (work.kv_len > 0))
    scores = _base_two(plan, product(q_tile, q_tile.transpose((1, 0)), BLOCK))
    scores = jnp.where(has_new & (column == plan.group), scores, MASKED)
    weight = jnp.where(
        has_new & (column == plan.group + 1), jnp.ones_like(scores), jnp.zeros_like(scores)
    )
    return _Seen(
        weighted=weights.put(weight).add(nothing.weighted, q_tile),
        highest=jnp.maximum(scores.max(axis=1), nothing.highest),
        total=weight.sum(axis=1),
    )


def _attend(
    plan: Plan,
    refs: Refs,
    work: Work,
    steps: jax.Array,
    q_tile: Any,
    weights: "_Weights",
    seen: _Seen,
) -> _Seen:
    """Return the running softmax after the blocks of `work`."""
    blocks = Blocks(plan, refs.rings, work, steps)
    k, v = refs.rings.k, refs.rings.v
    windowed = plan.sliding_window is not None

    def visible(shape: tuple[int, int], axis: int, first: jax.Array) -> jax.Array:
        token = iota(shape, axis) + first
        return (work.oldest <= token) & (token < work.end) if windowed else token < work.end

    def step(j: jax.Array, seen: _Seen, *, ragged: bool) -> _Seen:
        """Add the j-th block to `seen`; without `ragged` all of its tokens are visible."""
        first = blocks.token(j)
        stage = blocks.take(k, j)
        scores = product(q_tile, k.buffer.at[stage].transpose((1, 0)), BLOCK)
        plgpu.barrier_arrive(k.free.at[stage])
        scores = _base_two(plan, scores)
        if ragged:
            scores = jnp.where(visible((ROWS, BLOCK), 1, first), scores, MASKED)
        higher = jnp.maximum(seen.highest, scores.max(axis=1))
        fade = jnp.exp2(seen.highest - higher)
        weight = jnp.exp2(scores - spread(higher, BLOCK))
        rounded = weights.put(weight)
        total = seen.total * fade + weight.sum(axis=1)
        faded = seen.weighted * spread(fade, plan.head_dim)
        stage = blocks.take(v, j)
        if ragged:

            @pl.when((first < work.oldest) | (first + BLOCK > work.end))
            def _() -> None:
                # A weight of 0 does not remove a NaN, which unread memory may hold.
                rows = v.buffer[stage]
                shown = visible((BLOCK, plan.head_dim), 0, first)
                v.buffer[stage] = jnp.where(shown, rows, jnp.zeros_like(rows))
                plgpu.commit_smem()

        weighted = rounded.add(faded, v.buffer.at[stage])
        plgpu.barrier_arrive(v.free.at[stage])
        return _Seen(weighted, higher, total)

    if windowed:
        return lax.fori_loop(0, blocks.count, partial(step, ragged=True), seen)

    # Without a window only the last block may be ragged. With no blocks neither loop has a turn.
    last = jnp.maximum(blocks.count - 1, 0)
    seen = lax.fori_loop(0, last, partial(step, ragged=False), seen)
    return lax.fori_loop(last, blocks.count, partial(step, ragged=True), seen)


class _Weights(NamedTuple):
    """Weights as the left operand of products with V."""

    plan: Plan
    tile: Any  # [64, C] in shared memory, for Pallas' interpreter; else None
    values: Any = None  # the operand of products: in registers, or the tile

    def put(self, weights: jax.Array) -> "_Weights":
        """Return `self` with these weights, f32[64, C]."""
        rounded = weights.astype(jnp.bfloat16)
        if self.plan.weights_in_registers:
            return self._replace(values=rounded)
        self.tile[...] = rounded
        plgpu.commit_smem()
        return self._replace(values=self.tile)

    def add(self, sums: jax.Array, v: Any) -> jax.Array:
        """Return sums [64, H] + weights @ v, with v a tile [C, H] in shared memory."""
        if self.plan.weights_in_registers:
            return accumulate(sums, self.values, v)
        return sums + product(self.values, v, self.plan.head_dim)


def _store_whole(
    plan: Plan, work: Work, outputs: tuple[Any, ...], out: jax.Array, rows: Any
) -> None:
    """Store the result, through the shared memory of the rows that the work began with."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the new K and V have left
    put(rows, 0, out)
    plgpu.commit_smem()
    result = rows.at[pl.ds(0, plan.group)]
    plgpu.copy_smem_to_gmem(result, outputs[-1].at[work.row, work.head])


def _store_part(
    plan: Plan,
    work: Work,
    outputs: tuple[Any, ...],
    out: jax.Array,
    log_sum: jax.Array,
    columns: Any,
    log_total: Any,
) -> None:
    """Store a part's float32 result, a few columns at a time."""
    at_part = (work.row, work.head, work.part)
    for start in range(0, plan.head_dim, plan.out_columns):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        columns[...] = out[:, start : start + plan.out_columns]
        if start == 0:
            log_total[...] = log_sum
        plgpu.commit_smem()
        result = outputs[0].at[(*at_part, slice(None), pl.ds(start, plan.out_columns))]
        plgpu.copy_smem_to_gmem(columns.at[pl.ds(0, plan.group)], result)
    padded = pl.ds(0, plan.group + plan.padding)
    plgpu.copy_smem_to_gmem(log_total.at[padded], outputs[1].at[at_part])


def _base_two(plan: Plan, scores: jax.Array) -> jax.Array:
    return base_two(scores, plan.scale, plan.logit_soft_cap)
