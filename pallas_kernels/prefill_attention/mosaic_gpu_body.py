"""The program of a block of threads of prefill attention on Hopper GPUs: one warpgroup copies
queries and pages, two compute.

Those that compute go through the blocks of all pieces of work as one sequence. A step has two
products under way at once: of the queries with a block of K, and of the weights of the block before
with its V. Behind a piece's last block comes the first of the next piece, whose queries are there
already; the result of the one before is stored within that step. So the tensor cores have work
throughout.

FlashAttention-3 computes weights while the product with V is still under way. Here that product is
awaited first, which frees its stage earlier: with two stages, that was faster (experiments/log,
2026-11-30).
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from pallas_kernels.online_softmax import LOWEST
from pallas_kernels.prefill_attention.mosaic_gpu_copy import copy
from pallas_kernels.prefill_attention.mosaic_gpu_work import (
    BLOCK,
    COMPUTE,
    SLOTS,
    Plan,
    Refs,
    Work,
    nth_work,
)

_CLEARED = 64  # tokens of V that are cleared at once


def scratch_types(plan: Plan, dtype: Any) -> dict[str, Any]:
    """Allocate shared memory and barriers, by the names that `body` expects."""
    rings = Rings.scratch(
        dtype,
        stages=plan.stages,
        block=BLOCK,
        head_dim=plan.head_dim,
        page_size=plan.page_size,
        readers=COMPUTE,
    )
    halves = (COMPUTE, ROWS, plan.head_dim)
    scratch = {
        **rings,
        "q_tiles": tiled((SLOTS, *halves), dtype),
        "out_tiles": plgpu.RefUnion(tiled(halves, dtype), plgpu.SMEM(halves, dtype)),
        "q_full": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=SLOTS),
        "q_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=SLOTS),
    }
    if not plan.weights_in_registers:
        scratch["weights"] = tiled((COMPUTE, ROWS, BLOCK), dtype)
    return scratch


def body(
    plan: Plan,
    q: Any,
    k_pages: Any,
    v_pages: Any,
    kv_pages: Any,
    tiles: Any,
    out: Any,
    **scratch: Any,
) -> None:
    """Run the program of one block of threads on the launch's operands, result and scratch."""
    refs = Refs(q, kv_pages, tiles, out, Rings.take(k_pages, v_pages, scratch))
    warpgroup = lax.axis_index("warpgroup")
    queries = {name: scratch.pop(name) for name in ("q_tiles", "q_full", "q_free")}

    @pl.when(warpgroup == COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        copy(plan, refs, **queries)

    @pl.when(warpgroup < COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        _Half(plan, refs, warpgroup, **queries, **scratch).compute()


class _Seen(NamedTuple):
    """The running softmax of half a tile, float32. The newest block's weights have not been
    multiplied with its V yet."""

    weighted: jax.Array  # [64, H], the sum of weight * value
    highest: jax.Array  # [64], base-2 score
    total: jax.Array  # [64], the sum of weights, the newest included
    weights: Any  # bf16[64, C], the newest; None before the first block


class _At(NamedTuple):
    """Where a warpgroup is: the block whose weights are the newest."""

    n: jax.Array  # number of its piece of work
    i: jax.Array  # number of the block in that piece
    step: jax.Array  # number of the block in all of them
    work: Work
    following: Work  # the next piece
    afterwards: Work  # the one behind it, read long before it is needed


@dataclass(frozen=True)
class _Half:
    """Half of each tile, for which one warpgroup computes attention."""

    plan: Plan
    refs: Refs
    warpgroup: jax.Array
    q_tiles: Any  # [SLOTS, 2, 64, H]
    q_full: Any  # barriers [SLOTS]
    q_free: Any  # barriers [SLOTS]
    out_tiles: Any  # two layouts of [2, 64, H]
    weights: Any = None  # [2, 64, C]

    def compute(self) -> None:
        """Compute all pieces of work of this program."""
        zero = jnp.int32(0)
        works = tuple(nth_work(self.plan, self.refs, zero + n) for n in range(3))

        @pl.when(works[0].exists)
        def _() -> None:
            at = _At(zero, zero, zero, *works)
            at, seen = lax.while_loop(self._goes_on, self._step, (at, self._begin(works[0])))
            self._clear_unseen(at)
            weighted = self._add(seen, at.step)
            self._free_v(at.step)
            self._store(at.work, weighted, seen.total)
            plgpu.barrier_arrive(self.q_free.at[lax.rem(at.n, jnp.int32(SLOTS))])
            plgpu.wait_smem_to_gmem(0)

    def _goes_on(self, carry: tuple[_At, _Seen]) -> jax.Array:
        at, _ = carry
        return at.following.exists | (at.i + 1 < at.work.blocks(self.plan))

    def _begin(self, work: Work) -> _Seen:
        """Return what the first piece has seen after its first block."""
        k, step = self.refs.rings.k, jnp.int32(0)
        plgpu.barrier_wait(self.q_full.at[0])
        plgpu.barrier_wait(k.full.at[0])
        scores = product(
            self.q_tiles.at[0, self.warpgroup], k.buffer.at[0].transpose((1, 0)), BLOCK
        )
        plgpu.barrier_arrive(k.free.at[0])
        nothing = self._nothing()
        highest, _, total, weights = self._weigh(work, step, scores, nothing.highest, nothing.total)
        self._await_v(step)
        return _Seen(nothing.weighted, highest, total, weights.astype(self.q_tiles.dtype))

    def _step(self, carry: tuple[_At, _Seen]) -> tuple[_At, _Seen]:
        """Add the newest block's values to what was seen, and weigh the block behind it. If that is
        another piece's, store the result of the one before."""
        plan, (at, seen) = self.plan, carry
        is_new = at.i + 1 == at.work.blocks(plan)
        n = at.n + is_new.astype(jnp.int32)
        i = jnp.where(is_new, 0, at.i + 1)
        work = Work(*(jnp.where(is_new, *pair) for pair in zip(at.following, at.work, strict=True)))
        following, afterwards = lax.cond(
            is_new,
            lambda: (at.afterwards, nth_work(plan, self.refs, n + 2)),
            lambda: (at.following, at.afterwards),
        )
        slot = lax.rem(n, jnp.int32(SLOTS))
        self._clear_unseen(at)

        @pl.when(is_new)
        def _() -> None:
            plgpu.barrier_arrive(self.q_free.at[lax.rem(at.n, jnp.int32(SLOTS))])
            plgpu.barrier_wait(self.q_full.at[slot])

        highest, total = lax.cond(
            is_new,
            lambda: (self._nothing().highest, self._nothing().total),
            lambda: (seen.highest, seen.total),
        )
        weigh = partial(self._weigh, work, i, highest=highest, total=total)
        tile = self.q_tiles.at[slot, self.warpgroup]
        weighted, (highest, fade, total, weights) = self._multiply(tile, at.step + 1, seen, weigh)

        def store() -> jax.Array:
            self._store(at.work, weighted, seen.total)
            return self._nothing().weighted

        weighted = lax.cond(is_new, store, lambda: weighted * spread(fade, plan.head_dim))
        at = _At(n, i, at.step + 1, work, following, afterwards)
        return at, _Seen(weighted, highest, total, weights)

    # Parts of a step.

    def _stage(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.plan.stages))

    def _await_v(self, step: jax.Array) -> None:
        plgpu.barrier_wait(self.refs.rings.v.full.at[self._stage(step)])

    def _free_v(self, step: jax.Array) -> None:
        plgpu.barrier_arrive(self.refs.rings.v.free.at[self._stage(step)])

    def _nothing(self) -> _Seen:
        """Return the running softmax before the first block."""
        wide, row_layout = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
        return _Seen(
            plgpu.layout_cast(jnp.zeros((ROWS, self.plan.head_dim), jnp.float32), wide),
            plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), row_layout),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout),
            None,
        )

    def _multiply(
        self, tile: Any, step: jax.Array, seen: _Seen, weigh: Callable[[jax.Array], Any]
    ) -> tuple[jax.Array, Any]:
        """Multiply the queries with the K of a step, and `seen.weights` with the V of the step
        before, which is there. Return the sums of weighted values and weigh(scores), with weights
        rounded; then V of this step is there."""
        k, v = self.refs.rings.k, self.refs.rings.v
        stage = self._stage(step)
        keys = k.buffer.at[stage].transpose((1, 0))
        plgpu.barrier_wait(k.full.at[stage])

        def end(scores: jax.Array, weighted: jax.Array) -> tuple[jax.Array, Any]:
            self._free_v(step - 1)
            *softmax, weight = weigh(scores)
            self._await_v(step)
            return weighted, (*softmax, weight.astype(tile.dtype))

        def multiply(scores_ref: Any, sums_ref: Any) -> tuple[jax.Array, Any]:
            sums_ref[...] = seen.weighted
            plgpu.wgmma(scores_ref, tile, keys)
            plgpu.wgmma(sums_ref, seen.weights, v.buffer.at[self._stage(step - 1)])
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            plgpu.barrier_arrive(k.free.at[stage])
            weighted = plgpu.wgmma_accumulator_load(sums_ref, wait_n=0)
            # Otherwise weights might be computed before the wait, in registers of the product.
            weighted, scores = lax.optimization_barrier((weighted, scores))
            return end(scores, weighted)

        if not self.plan.weights_in_registers:
            scores = product(tile, keys, BLOCK)
            weighted = self._add(seen, step - 1)
            plgpu.barrier_arrive(k.free.at[stage])
            return end(scores, weighted)
        return pl.run_scoped(
            multiply,
            plgpu.ACC((ROWS, BLOCK), jnp.float32),  # type: ignore[attr-defined]
            plgpu.ACC((ROWS, self.plan.head_dim), jnp.float32),  # type: ignore[attr-defined]
        )

    def _add(self, seen: _Seen, step: jax.Array) -> jax.Array:
        """Return the sums of weighted values with those of a step, whose V is there."""
        values = self.refs.rings.v.buffer.at[self._stage(step)]
        if self.plan.weights_in_registers:
            return accumulate(seen.weighted, seen.weights, values)
        tile = self.weights.at[self.warpgroup]
        tile[...] = seen.weights
        plgpu.commit_smem()
        return seen.weighted + product(tile, values, self.plan.head_dim)

    def _weigh(
        self, work: Work, i: jax.Array, scores: jax.Array, highest: jax.Array, total: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return the highest score, the factor of what was seen before, the sum of weights, and the
        weights of a block."""
        plan = self.plan
        factor = 1.0
        if plan.logit_soft_cap is None:
            factor = plan.scale * LOG2_E  # applied where a score is used, in one operation
        else:
            scores = base_two(scores, plan.scale, plan.logit_soft_cap)
        scores = self._mask(work, i, scores)
        higher = jnp.maximum(highest, scores.max(axis=1) * factor)
        fade = jnp.exp2(highest - higher)
        weight = jnp.exp2(scores * factor - spread(higher, BLOCK))
        total = total * fade + weight.sum(axis=1)
        return higher, fade, total, weight

    # Masks.

    def _position(self, work: Work) -> jax.Array:
        """Return the position of this half's first row."""
        return work.position + self.warpgroup * ROWS

    def _whole(self, work: Work) -> jax.Array:
        """Return the number of leading blocks that every row of this half sees whole."""
        if self.plan.sliding_window is not None:
            return jnp.int32(0)
        base = work.position - self._position(work)
        oldest = self._position(work) + jnp.clip(work.begin + base, 0, ROWS)
        whole = lax.div(jnp.maximum(oldest + 1, 0), jnp.int32(BLOCK))
        return jnp.minimum(whole, work.blocks(self.plan))

    def _mask(self, work: Work, i: jax.Array, scores: jax.Array) -> jax.Array:
        """Take away the scores of tokens that a row does not see."""

        def mask() -> jax.Array:
            # Beside what differs between blocks, so that no array is kept from block to block.
            shift = (work.first(self.plan) + i) * BLOCK - self._position(work)
            column, row = iota((ROWS, BLOCK), 1) + shift, iota((ROWS, BLOCK), 0)
            visible = column <= row
            if self.plan.sliding_window is not None:
                visible &= column + self.plan.sliding_window > row
            return jnp.where(visible, scores, -jnp.inf)

        if self.plan.sliding_window is not None:
            return mask()
        return lax.cond(i < self._whole(work), lambda: scores, mask)

    def _clear_unseen(self, at: _At) -> None:
        """Clear V of the newest block for tokens that no row of the tile sees: it may be NaN, which
        a weight of 0 does not remove. Each half clears the same tokens before its own product and
        writes the others unchanged, so the bytes that the other half may be reading do not
        change."""
        plan, work, values = self.plan, at.work, self.refs.rings.v.buffer
        block, stage = work.first(plan) + at.i, self._stage(at.step)
        stop = work.position + work.end
        window = plan.sliding_window
        start = jnp.int32(0) if window is None else work.position + work.begin - window + 1

        @pl.when(((block + 1) * BLOCK > stop) | (block * BLOCK < start))
        def _() -> None:
            @pl.loop(0, BLOCK, step=_CLEARED)
            def _(first: jax.Array) -> None:
                place = stage, pl.ds(pl.multiple_of(first, _CLEARED), _CLEARED)
                rows = values[place]
                token = iota(rows.shape, 0) + (block * BLOCK + first)
                seen = (start <= token) & (token < stop)
                values[place] = jnp.where(seen, rows, jnp.zeros_like(rows))

            plgpu.commit_smem()

    # Results.

    def _store(self, work: Work, weighted: jax.Array, total: jax.Array) -> None:
        """Store the sequence's rows of this half; other pieces of work write the other rows."""
        plan, (swizzled, plain) = self.plan, self.out_tiles
        total = jnp.where(total > 0, total, jnp.ones_like(total))
        out = (weighted * spread(1.0 / total, plan.head_dim)).astype(self.q_tiles.dtype)
        base = self._position(work) - work.position
        begin, end = (jnp.clip(row - base, 0, ROWS) for row in (work.begin, work.end))
        tokens, head = work.rows(self.warpgroup)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(end - begin == ROWS)
        def _() -> None:
            tile = swizzled.at[self.warpgroup]
            tile[...] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, self.refs.out.at[tokens, head])

        @pl.when(end - begin < ROWS)
        def _() -> None:
            tile = plain.at[self.warpgroup]
            tile[...] = out
            plgpu.commit_smem()

            @pl.loop(begin, end)
            def _(i: jax.Array) -> None:
                row = self.refs.out.at[pl.ds(tokens.start + i, 1), head]
                plgpu.copy_smem_to_gmem(tile.at[pl.ds(i, 1)], row)
