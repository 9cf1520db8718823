"""The computing warpgroups of decode attention over int8 pages on Hopper GPUs.

The two products are transposed. A block of tokens is their left operand, as 64 rows, and the few
queries of a KV head are columns, of which eight suffice. So scores and weights take an eighth of
the work that they take as rows, which leaves time to convert pages to bfloat16. bfloat16 holds
every int8 exactly. Scales belong to tokens: they multiply scores and weights.

    scores [C, Q] = K [C, H] q^T [H, Q]        result [H, Q] += V^T [H, C] weights [C, Q]

One warpgroup that converts and computes is slower than memory. So where there is room, two of them
take alternate blocks of a piece of work, and one converts while the other waits. The second passes
its running softmax to the first, which begins and ends the piece.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import LOG2_E, Ring, Rings, base_two, iota, tiled
from pallas_kernels.online_softmax import LOWEST, MASKED
from pallas_kernels.paged_attention.mosaic_gpu_plan import BLOCK, Plan
from pallas_kernels.paged_attention.mosaic_gpu_rows import Rows
from pallas_kernels.paged_attention.mosaic_gpu_work import (
    NO_SUM,
    Blocks,
    Refs,
    Turn,
    Work,
    each_work,
)


def scratch_types(plan: Plan, dtype: Any) -> dict[str, Any]:
    """Allocate shared memory and barriers, by the names that `compute` and the rings expect."""
    rings = Rings.scratch(
        jnp.int8,
        stages=plan.stages,
        block=BLOCK,
        head_dim=plan.head_dim,
        page_size=plan.page_size,
        readers=plan.readers,
        scaled=True,
    )
    scratch = {
        **rings,
        **Rows.scratch(plan, dtype),
        "q_tile": tiled((plan.queries, plan.head_dim), dtype),
        "k_tile": tiled((plan.readers, BLOCK, plan.head_dim), dtype),
        "v_tile": tiled((plan.readers, BLOCK, plan.head_dim), dtype),
        "weights": tiled((plan.readers, plan.queries, BLOCK), dtype),
    }
    if plan.readers > 1:
        scratch |= {name: plgpu.Barrier() for name in ("queries_full", "handed_over")}
        scratch["handed"] = plgpu.SMEM((plan.head_dim, plan.queries), jnp.float32)
        scratch["numbers"] = plgpu.SMEM((2, plan.queries), jnp.float32)
    if plan.parts == 1:
        scratch["out"] = plgpu.SMEM((plan.queries, plan.head_dim), dtype)
    else:
        scratch["out"] = plgpu.SMEM((plan.head_dim, plan.queries), jnp.float32)
        scratch["log_total"] = plgpu.SMEM((plan.queries,), jnp.float32)
    return scratch


class _Seen(NamedTuple):
    """The running softmax of a piece of work, float32."""

    weighted: jax.Array  # [H, Q], the sum of weight * value
    highest: jax.Array  # [Q], base-2 score
    total: jax.Array  # [64, Q]; the sum of its rows is the sum of weights


@dataclass(frozen=True)
class _Shared:
    """Shared memory and barriers beside the rings; see `scratch_types`."""

    q_tile: Any  # [Q, H], in the layout of products
    k_tile: Any  # [readers, C, H], likewise
    v_tile: Any  # [readers, C, H], likewise
    weights: Any  # [readers, Q, C], likewise
    out: Any  # [Q, H], or for a part f32[H, Q]: the result before it is stored
    log_total: Any = None  # f32[Q]
    queries_full: Any = None  # barrier: `q_tile` is filled, `handed` and `numbers` were read
    handed_over: Any = None  # barrier: `handed` and `numbers` are filled
    handed: Any = None  # f32[H, Q], weighted values of the second reader
    numbers: Any = None  # f32[2, Q], highest score and sum of weights of the second reader

    def tiles(self, reader: int) -> "_Tiles":
        """Return a reader's operands of products."""
        own_tiles = (each.at[reader] for each in (self.k_tile, self.v_tile, self.weights))
        return _Tiles(self.q_tile, *own_tiles)


def compute(plan: Plan, refs: Refs, outputs: tuple[Any, ...], **scratch: Any) -> None:
    """Compute every piece of work of a program and store the results in `outputs`."""
    begun = Rows.take(plan, refs, scratch)
    shared = _Shared(**scratch)
    tiles, out, log_total = shared.tiles(0), shared.out, shared.log_total

    def compute_work(work: Work, steps: jax.Array, row_slot: Any) -> None:
        wide = plgpu.Layout.WGMMA
        queries = row_slot.at[pl.ds(0, plan.queries)].transpose((1, 0))
        tiles.q.transpose((1, 0))[...] = plgpu.load(queries, layout=wide, optimized=False)
        if plan.append:
            tiles.k[...] = plgpu.load(row_slot, layout=wide, optimized=False)
        plgpu.commit_smem()
        if plan.readers > 1:
            plgpu.barrier_arrive(shared.queries_full)
        seen = _begin(plan, work, tiles, begun.new_scales)
        if plan.append:
            begun.store_new(work, row_slot)
        seen = _attend(plan, refs, work, steps, tiles, seen, 0)
        total = seen.total.sum(axis=0)
        if plan.readers > 1:
            seen, total = _take_over(plan, shared, seen, total)
        total = jnp.maximum(total, NO_SUM)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous result has left
        result = seen.weighted / _broadcast(total, plan.head_dim)
        if plan.parts == 1:
            out.transpose((1, 0))[...] = result.astype(out.dtype)
        else:
            out[...] = result
            log_total[...] = seen.highest + jnp.log(total) * LOG2_E
        plgpu.commit_smem()
        _store(plan, work, outputs, out, log_total)

    begun.each(compute_work)
    plgpu.wait_smem_to_gmem(0)


def help_compute(plan: Plan, refs: Refs, **scratch: Any) -> None:
    """Compute the second reader's share of every piece of work."""
    Rows.take(plan, refs, scratch)  # removes the rows, which only the first reader uses
    shared = _Shared(**scratch)

    def help_with(turn: Turn) -> None:
        plgpu.barrier_wait(shared.queries_full)
        seen = _attend(plan, refs, turn.work, turn.steps, shared.tiles(1), _nothing(plan), 1)
        shared.numbers[0] = seen.highest
        shared.numbers[1] = seen.total.sum(axis=0)
        shared.handed[...] = seen.weighted
        plgpu.barrier_arrive(shared.handed_over)

    each_work(plan, refs, help_with)


def _take_over(
    plan: Plan, shared: _Shared, seen: _Seen, total: jax.Array
) -> tuple[_Seen, jax.Array]:
    """Merge the running softmaxes of both readers; return it and the sums of weights."""
    wide = plgpu.Layout.WGMMA
    plgpu.barrier_wait(shared.handed_over)
    highest, other_total = (
        plgpu.load(shared.numbers.at[i], layout=wide.reduce(0), optimized=False) for i in range(2)
    )
    other = plgpu.load(shared.handed, layout=wide, optimized=False)
    higher = jnp.maximum(seen.highest, highest)
    fade, other_fade = jnp.exp2(seen.highest - higher), jnp.exp2(highest - higher)
    weighted = seen.weighted * _broadcast(fade, plan.head_dim)
    weighted = weighted + other * _broadcast(other_fade, plan.head_dim)
    return _Seen(weighted, higher, seen.total), total * fade + other_total * other_fade


class _Tiles(NamedTuple):
    """Operands of products."""

    q: Any
    k: Any
    v: Any
    weights: Any

    def scores(self, between: Any = lambda: None) -> tuple[jax.Array, Any]:
        """Multiply K and the queries, float32[C, Q]; return it with the result of `between`, which
        runs meanwhile."""

        def multiply(into: Any) -> tuple[jax.Array, Any]:
            plgpu.wgmma(into, self.k, self.q.transpose((1, 0)))
            returned = between()
            return into[...], returned

        shape = BLOCK, self.q.shape[0]
        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))  # type: ignore[attr-defined]

    def values(self, v: Any) -> jax.Array:
        """Multiply V and the weights, float32[H, Q]."""

        def multiply(into: Any) -> jax.Array:
            plgpu.wgmma(into, v.transpose((1, 0)), self.weights.transpose((1, 0)))
            return into[...]

        shape = v.shape[1], self.q.shape[0]
        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))  # type: ignore[attr-defined]

    def weigh(self, weights: jax.Array) -> None:
        """Store weights [C, Q] in the layout of products."""
        self.weights.transpose((1, 0))[...] = weights.astype(self.weights.dtype)
        plgpu.commit_smem()


def _broadcast(x: jax.Array, rows: int) -> jax.Array:
    """Broadcast x [Q] to [rows, Q]."""
    return lax.broadcast_in_dim(x, (rows, *x.shape), (1,))


def _nothing(plan: Plan) -> _Seen:
    """Return the running softmax before the first key."""
    wide = plgpu.Layout.WGMMA
    lowest = jnp.full((plan.queries,), LOWEST, jnp.float32)
    return _Seen(
        weighted=plgpu.layout_cast(jnp.zeros((plan.head_dim, plan.queries), jnp.float32), wide),
        highest=plgpu.layout_cast(lowest, wide.reduce(0)),
        total=plgpu.layout_cast(jnp.zeros((BLOCK, plan.queries), jnp.float32), wide),
    )


def _begin(plan: Plan, work: Work, tiles: _Tiles, new_scales: Any) -> _Seen:
    """Return the running softmax before the first block. With `append` the first part has seen the
    new token, with K and V as rows of K's tile: products with the tile itself give its score, and
    its V times a weight of 1."""
    nothing, shape = _nothing(plan), (BLOCK, plan.queries)
    if not plan.append:
        return nothing
    row = iota(shape, 0)
    has_new = jnp.full(shape, (work.part == 0) & (work.kv_len > 0))
    scores = _base_two(plan, tiles.scores()[0] * new_scales[plan.group])
    scores = jnp.where(has_new & (row == plan.group), scores, MASKED)
    is_value = has_new & (row == plan.group + 1)
    weight = jnp.where(is_value, jnp.ones_like(scores), jnp.zeros_like(scores))
    value = jnp.where(is_value, jnp.full(shape, new_scales[plan.group + 1]), weight)
    tiles.weigh(value)
    return _Seen(
        weighted=tiles.values(tiles.k),
        highest=jnp.maximum(scores.max(axis=0), nothing.highest),
        total=weight,
    )


def _attend(
    plan: Plan,
    refs: Refs,
    work: Work,
    steps: jax.Array,
    tiles: _Tiles,
    seen: _Seen,
    reader: int,
) -> _Seen:
    """Return the running softmax after this reader's blocks of `work`."""
    blocks = Blocks(plan, refs.rings, work, steps, reader)
    k, v = refs.rings.k, refs.rings.v
    shape = BLOCK, plan.queries
    row = iota(shape, 0)

    def unpack(ring: Ring, j: jax.Array, tile: Any) -> jax.Array:
        """Move the elements of a block to `tile` and free its stage; return its scales, [C, Q]."""
        stage = blocks.take(ring, j)
        row_layout = plgpu.Layout.WGMMA.reduce(1)
        scales = plgpu.load(ring.scale_buffer.at[stage], layout=row_layout, optimized=False)
        wide = plgpu.Layout.WGMMA
        elements = plgpu.load(ring.buffer.at[stage], layout=wide, optimized=False)
        tile[...] = elements.astype(tile.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(ring.free.at[stage])
        return lax.broadcast_in_dim(scales, shape, (0,))

    def step(j: jax.Array, seen: _Seen) -> _Seen:
        token = row + blocks.token(j)
        visible = (work.oldest <= token) & (token < work.end)

        k_scales = unpack(k, j, tiles.k)
        scores, v_scales = tiles.scores(lambda: unpack(v, j, tiles.v))
        scores = jnp.where(visible, _base_two(plan, scores * k_scales), MASKED)
        higher = jnp.maximum(seen.highest, scores.max(axis=0))
        fade = jnp.exp2(seen.highest - higher)
        weight = jnp.exp2(scores - _broadcast(higher, BLOCK))
        # A weight of 0 does not remove a NaN, which a scale in unread memory may be.
        tiles.weigh(jnp.where(visible, weight * v_scales, jnp.zeros_like(weight)))
        return _Seen(
            weighted=seen.weighted * _broadcast(fade, plan.head_dim) + tiles.values(tiles.v),
            highest=higher,
            total=seen.total * _broadcast(fade, BLOCK) + weight,
        )

    seen = lax.fori_loop(0, blocks.count, step, seen)
    blocks.leave()
    return seen


def _store(plan: Plan, work: Work, outputs: tuple[Any, ...], out: Any, log_total: Any) -> None:
    """Store the result, or that of a part."""
    if plan.parts == 1:
        result = out.at[pl.ds(0, plan.group)]
        plgpu.copy_smem_to_gmem(result, outputs[0].at[work.row, work.head])
        return
    place = (work.row, work.head, work.part)
    plgpu.copy_smem_to_gmem(out, outputs[0].at[place])
    plgpu.copy_smem_to_gmem(log_total, outputs[1].at[place])


def _base_two(plan: Plan, scores: jax.Array) -> jax.Array:
    return base_two(scores, plan.scale, plan.logit_soft_cap)
