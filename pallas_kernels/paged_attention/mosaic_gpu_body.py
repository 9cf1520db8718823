"""What a block of threads of decode attention does on Hopper GPUs: one warpgroup copies pages into
the rings, one computes."""

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
    Ring,
    Rings,
    base_two,
    iota,
    product,
    spread,
    tiled,
)
from pallas_kernels.online_softmax import LOWEST, MASKED
from pallas_kernels.paged_attention.mosaic_gpu_work import BLOCK, Plan, Refs, Work, each_work
from pallas_kernels.quantised import LIMITS

_OUT_COLUMNS = 64  # of a float32 result on its way out: shared memory is full of pages
_NO_SUM = 1e-30  # in place of 0 where a part saw nothing: 0 / it is 0, and its logarithm finite


def scratch_types(plan: Plan, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers, by `body`'s names for them."""
    rings = Rings.scratch(
        jnp.int8 if plan.scaled else dtype,
        stages=plan.stages,
        block=BLOCK,
        head_dim=plan.head_dim,
        page_size=plan.page_size,
        readers=1,
        scaled=plan.scaled,
    )
    scratch = {
        **rings,
        "rows": plgpu.SMEM((plan.slots, ROWS, plan.head_dim), dtype),
        "q_tile": tiled((ROWS, plan.head_dim), dtype),
        "weights": tiled((ROWS, BLOCK), dtype),
        "rows_full": plgpu.Barrier(num_barriers=plan.slots),
    }
    if plan.scaled:
        scratch["tile"] = tiled((BLOCK, plan.head_dim), dtype)
    if plan.scaled and plan.append:
        # A row is a copy's own, which must begin at a multiple of 128 bytes.
        copies = max(1, 128 // plan.head_dim)
        scratch["new"] = plgpu.SMEM((ROWS, copies, plan.head_dim), jnp.int8)
        scratch["new_scales"] = plgpu.SMEM((ROWS,), jnp.float32)
    if plan.parts > 1:
        scratch["out_tile"] = plgpu.SMEM((ROWS, _OUT_COLUMNS), jnp.float32)
        scratch["log_total"] = plgpu.SMEM((ROWS,), jnp.float32)
    return scratch


def body(plan: Plan, loaded: Any, k_pages: Any, v_pages: Any, *refs: Any, **scratch: Any) -> None:
    """The program of one block of threads.

    Args:
      loaded, k_pages, v_pages, refs: the launch's operands in the order of `Refs`, pools in the
        place of rings; then its results.
      scratch: see `scratch_types`.
    """
    scales, refs = (refs[:2], refs[2:]) if plan.scaled else ((), refs)
    inputs, outputs = (refs[:5], refs[5:]) if plan.append else (refs[:2], refs[2:])
    table, lens, *rest = inputs
    rings = Rings.take(k_pages, v_pages, scratch, scales)
    operands = Refs(loaded, table, lens, rings, *rest)

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy_pages(plan, operands)

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        _compute(plan, operands, outputs, **scratch)


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
    tile: Any = None,  # [C, H], what elements of a block become
    new: Any = None,  # int8[64, _, H], of which K and V are rows
    new_scales: Any = None,  # f32[64], of the same rows
    out_tile: Any = None,  # f32[64, columns]
    log_total: Any = None,  # f32[64]
) -> None:
    def fetch(n: jax.Array, index: jax.Array) -> None:
        """Begin to load the rows of the n-th piece of work into its slot, once what a former one
        left there has gone out. What is past them is undefined."""
        slot = lax.rem(n, jnp.int32(plan.slots))
        head = lax.rem(lax.div(index, jnp.int32(plan.parts)), jnp.int32(plan.kv_heads))
        row = lax.div(index, jnp.int32(plan.parts * plan.kv_heads))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(
            refs.loaded.at[row, head], rows.at[slot, pl.ds(0, plan.loaded)], rows_full.at[slot]
        )

    program = lax.axis_index("program")
    if plan.slots > 1:
        fetch(jnp.int32(0), program)

    def compute_work(n: jax.Array, work: Work, steps: jax.Array) -> None:
        index = program + n * plan.programs
        if plan.slots > 1:
            following = index + plan.programs
            pl.when(following < plan.work)(partial(fetch, n + 1, following))
        else:
            fetch(n, index)
        slot = lax.rem(n, jnp.int32(plan.slots))
        mine = rows.at[slot]
        plgpu.barrier_wait(rows_full.at[slot])
        if plan.append:
            _rotate(plan, refs, work, mine, new, new_scales)
        q_tile[...] = plgpu.load(mine, layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.commit_smem()
        seen = _begin(plan, work, q_tile, weights, new_scales)
        if plan.append:
            _store_new(plan, refs, work, mine, new, new_scales)
        weighted, highest, total = _attend(plan, refs, work, steps, q_tile, weights, tile, seen)
        total = jnp.maximum(total, _NO_SUM)
        out = [x / spread(total, x.shape[1]) for x in weighted]
        if plan.parts == 1:
            _store_whole(plan, work, outputs, out, mine)
        else:
            log_total[...] = highest + jnp.log(total) * LOG2_E
            _store_part(plan, work, outputs, out, out_tile, log_total)

    each_work(plan, refs, compute_work)
    plgpu.wait_smem_to_gmem(0)


def _put(rows: Any, start: int, x: jax.Array) -> None:
    """rows[:, start : start + columns] = x [64, columns], 8 columns at a time.

    Mosaic infers how shared memory is tiled from how it is sliced, and miscompiles the tiles of one
    row that it finds where slices are of 16 columns or more (JAX 0.11.2).
    """
    for at in range(0, x.shape[1], 8):
        rows[:, pl.ds(start + at, 8)] = x[:, at : at + 8].astype(rows.dtype)


def _rotate(plan: Plan, refs: Refs, work: Work, rows: Any, new: Any, new_scales: Any) -> None:
    """Scales the rows, rotates those of Q and K, and clears those past V, and all of an empty row:
    products mix what they find, and nothing times NaN is NaN. K and V that are to be quantised
    become whole numbers here, which bfloat16 holds."""
    half = plan.head_dim // 2
    wide = plgpu.Layout.WGMMA
    row = iota((ROWS, half), 0)
    is_value = row == plan.group + 1
    is_nothing = (row > plan.group + 1) | jnp.full(row.shape, work.kv_len == 0)
    scale = refs.row_scale[work.row]

    def angle(ref: Any) -> jax.Array:
        one = plgpu.load(ref.at[work.row], layout=wide.reduce(0), optimized=False)
        return lax.broadcast_in_dim(one, (ROWS, half), (1,))

    def part(start: int) -> jax.Array:
        ref = rows.at[:, pl.ds(start, half)]
        x = plgpu.load(ref, layout=wide, optimized=False).astype(jnp.float32)
        return jnp.where(is_nothing, jnp.zeros_like(x), x * scale)

    a, b, cos, sin = part(0), part(half), angle(refs.cos), angle(refs.sin)
    turned_a = jnp.where(is_value, a, a * cos - b * sin)
    turned_b = jnp.where(is_value, b, b * cos + a * sin)
    if plan.scaled:
        is_new = (row == plan.group) | is_value
        turned_a, turned_b = _rounded(plan, is_new, turned_a, turned_b, new, new_scales)
    _put(rows, 0, turned_a)
    _put(rows, half, turned_b)
    plgpu.commit_smem()


def _rounded(
    plan: Plan, is_new: jax.Array, a: jax.Array, b: jax.Array, new: Any, new_scales: Any
) -> tuple[jax.Array, jax.Array]:
    """`quantised.encode` of the new rows of [64, H/2] twice, into `new` and `new_scales`; and the
    halves with the elements in those rows."""
    limit = LIMITS["int8"]
    # A maximum drops NaNs, a sum does not, and nothing times infinity is one.
    poison = (a * 0.0 + b * 0.0).sum(axis=1)
    scales = jnp.maximum(jnp.abs(a).max(axis=1), jnp.abs(b).max(axis=1)) / limit + poison
    new_scales[...] = scales
    half = plan.head_dim // 2
    divisor = spread(jnp.where(scales > 0, scales, jnp.ones_like(scales)), half)
    halves = []
    for start, x in ((0, a), (half, b)):
        elements = lax.round(x / divisor, lax.RoundingMethod.TO_NEAREST_EVEN)
        _put(new.at[:, 0], start, jnp.clip(elements, -limit, limit))
        halves.append(jnp.where(is_new, elements, x))
    return halves[0], halves[1]


def _store_new(plan: Plan, refs: Refs, work: Work, rows: Any, new: Any, new_scales: Any) -> None:
    """The new K and V go to the slot of the row's newest position."""

    @pl.when((work.part == 0) & (work.kv_len > 0))
    def _() -> None:
        page = refs.table[work.row, lax.div(work.end, jnp.int32(plan.page_size))]
        offset = lax.rem(work.end, jnp.int32(plan.page_size))
        for ring, at in ((refs.rings.k, plan.group), (refs.rings.v, plan.group + 1)):
            target = ring.pages.at[work.head, page, pl.ds(offset, 1)]
            if not plan.scaled:
                plgpu.copy_smem_to_gmem(rows.at[pl.ds(at, 1)], target)
                continue
            plgpu.copy_smem_to_gmem(new.at[at, pl.ds(0, 1)], target)
            ring.scales[work.head, page, offset] = new_scales[at]


def _begin(plan: Plan, work: Work, q_tile: Any, weights: Any, new_scales: Any) -> _Seen:
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
    scores = product(q_tile, q_tile.transpose((1, 0)), BLOCK)
    if plan.scaled:
        scores = scores * new_scales[plan.group]
    scores = _scaled(plan, scores)
    scores = jnp.where(mine & (column == plan.group), scores, MASKED)
    weight = jnp.where(
        mine & (column == plan.group + 1), jnp.ones_like(scores), jnp.zeros_like(scores)
    )
    value = weight * new_scales[plan.group + 1] if plan.scaled else weight
    weights[...] = value.astype(weights.dtype)
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
    tile: Any,
    seen: _Seen,
) -> _Seen:
    """What has been seen after the blocks of `work`."""
    if plan.scaled:
        return _attend_scaled(plan, refs, work, steps, q_tile, weights, tile, seen)
    k, v = refs.rings.k, refs.rings.v

    def visible(shape: tuple[int, int], axis: int, block: jax.Array) -> jax.Array:
        token = iota(shape, axis) + block * BLOCK
        return (work.oldest <= token) & (token < work.end)

    def step(i: jax.Array, seen: _Seen) -> _Seen:
        stage, block = lax.rem(steps + i, jnp.int32(plan.stages)), work.first + i

        plgpu.barrier_wait(k.full.at[stage])
        scores = product(q_tile, k.buffer.at[stage].transpose((1, 0)), BLOCK)
        plgpu.barrier_arrive(k.free.at[stage])
        scores = jnp.where(visible((ROWS, BLOCK), 1, block), _scaled(plan, scores), MASKED)
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


def _attend_scaled(
    plan: Plan,
    refs: Refs,
    work: Work,
    steps: jax.Array,
    q_tile: Any,
    weights: Any,
    tile: Any,
    seen: _Seen,
) -> _Seen:
    """The same over int8 pages: elements, which bfloat16 holds, go into the products, and scales to
    scores and weights."""
    k, v = refs.rings.k, refs.rings.v
    column = iota((ROWS, BLOCK), 1)

    def unpack(ring: Ring, stage: jax.Array) -> jax.Array:
        """Moves a stage into `tile`, and frees it; its scales, [64, C]."""
        plgpu.barrier_wait(ring.full.at[stage])
        by_token = plgpu.Layout.WGMMA.reduce(0)
        scales = plgpu.load(ring.scale_buffer.at[stage], layout=by_token, optimized=False)
        elements = plgpu.load(ring.buffer.at[stage], layout=plgpu.Layout.WGMMA_UPCAST_2X)
        tile[...] = elements.astype(tile.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(ring.free.at[stage])
        return lax.broadcast_in_dim(scales, (ROWS, BLOCK), (1,))

    def step(i: jax.Array, seen: _Seen) -> _Seen:
        stage, block = lax.rem(steps + i, jnp.int32(plan.stages)), work.first + i
        token = column + block * BLOCK
        visible = (work.oldest <= token) & (token < work.end)

        k_scales = unpack(k, stage)
        scores = product(q_tile, tile.transpose((1, 0)), BLOCK)
        scores = jnp.where(visible, _scaled(plan, scores * k_scales), MASKED)
        higher = jnp.maximum(seen.highest, scores.max(axis=1))
        fade = jnp.exp2(seen.highest - higher)
        weight = jnp.exp2(scores - spread(higher, BLOCK))
        total = seen.total * fade + weight.sum(axis=1)

        v_scales = unpack(v, stage)
        # A weight of 0 does not silence a NaN, and unread memory may hold one for a scale.
        value = jnp.where(visible, weight * v_scales, jnp.zeros_like(weight))
        weights[...] = value.astype(weights.dtype)
        plgpu.commit_smem()
        weighted = tuple(
            x * spread(fade, x.shape[1]) + product(weights, tile.at[:, at], x.shape[1])
            for x, at in zip(seen.weighted, plan.columns, strict=True)
        )
        return _Seen(weighted, higher, total)

    return lax.fori_loop(0, work.count, step, seen)


def _store_whole(
    plan: Plan, work: Work, outputs: tuple[Any, ...], out: list[jax.Array], rows: Any
) -> None:
    """The result, over the rows that the work began with."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the new K and V
    for columns, x in zip(plan.columns, out, strict=True):
        _put(rows, columns.start, x)
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


def _scaled(plan: Plan, scores: jax.Array) -> jax.Array:
    return base_two(scores, plan.scale, plan.logit_soft_cap)
