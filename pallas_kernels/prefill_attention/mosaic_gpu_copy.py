"""The warpgroup that copies, of prefill attention on Hopper GPUs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import Ring
from pallas_kernels.prefill_attention.mosaic_gpu_work import (
    BLOCK,
    COMPUTE,
    SLOTS,
    Block,
    Plan,
    Refs,
    nth_work,
)


def copy(plan: Plan, refs: Refs, q_tiles: Any, q_full: Any, q_free: Any) -> None:
    """Copy queries, K and V in the order in which they are needed: V behind the next block's K."""
    rings = refs.rings

    def copy_work(carry: Any) -> Any:
        n, steps, work, before = carry
        following = nth_work(plan, refs, n + 1)
        slot, count = lax.rem(n, jnp.int32(SLOTS)), work.blocks(plan)
        first, last = work.block(plan, 0), work.block(plan, count - 1)
        pl.when(n >= SLOTS)(lambda: plgpu.barrier_wait(q_free.at[slot]))
        for warpgroup in range(COMPUTE):
            q_tile = q_tiles.at[slot, warpgroup]
            plgpu.copy_gmem_to_smem(refs.q.at[work.rows(warpgroup)], q_tile, q_full.at[slot])
        _copy_block(plan, refs, rings.k, first, steps)
        pl.when(n > 0)(lambda: _copy_block(plan, refs, rings.v, before, steps - 1))

        @pl.loop(1, count)
        def _(i: jax.Array) -> None:
            _copy_block(plan, refs, rings.k, work.block(plan, i), steps + i)
            _copy_block(plan, refs, rings.v, work.block(plan, i - 1), steps + i - 1)

        return n + 1, steps + count, following, last

    zero = jnp.int32(0)
    first = zero, zero, nth_work(plan, refs, zero), Block(zero, zero, zero)
    n, steps, _, last = lax.while_loop(lambda carry: carry[2].exists, copy_work, first)
    pl.when(n > 0)(lambda: _copy_block(plan, refs, rings.v, last, steps - 1))
    rings.drain(steps)
    for at in range(SLOTS):
        slot = lax.rem(n + at, jnp.int32(SLOTS))
        pl.when(n + at >= SLOTS)(partial(plgpu.barrier_wait, q_free.at[slot]))


def _copy_block(plan: Plan, refs: Refs, ring: Ring, block: Block, step: jax.Array) -> None:
    """Copy a block of K or of V as soon as its stage is free. A last block may reach past the
    list; tokens read there are masked."""
    piece = min(plan.page_size, BLOCK)
    stage = lax.rem(step, jnp.int32(plan.stages))
    starts = [block.number * BLOCK + at for at in range(0, BLOCK, piece)]
    entries = [block.page + lax.div(token, jnp.int32(plan.page_size)) for token in starts]
    pages = [refs.kv_pages[jnp.minimum(entry, plan.listed_pages - 1)] for entry in entries]
    pl.when(step >= plan.stages)(partial(plgpu.barrier_wait, ring.free.at[stage]))
    for n, (token, page) in enumerate(zip(starts, pages, strict=True)):
        start = pl.multiple_of(lax.rem(token, jnp.int32(plan.page_size)), piece)
        place = stage, pl.ds(n * piece, piece)
        plgpu.copy_gmem_to_smem(
            ring.pages.at[block.head, page, pl.ds(start, piece)],
            ring.buffer.at[place],
            ring.full.at[stage],
        )
