"""The program of a block of threads of prefill attention on Hopper GPUs: one warpgroup copies pages
into the rings, two compute."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import (
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

COMPUTE = 2
"""Number of warpgroups that compute."""

TILE = COMPUTE * ROWS
"""Most tokens of the packed batch in a piece of work."""

BLOCK = 128
"""Tokens of a stage of the rings."""


@dataclass(frozen=True)
class Plan:
    """The static parameters of a launch."""

    heads: int
    group: int
    head_dim: int
    page_size: int
    listed_pages: int  # entries of the list, padding included
    tiles: int  # rows of the tile table
    programs: int
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None
    weights_in_registers: bool
    """Whether weights stay in registers; Pallas' interpreter takes them from shared memory."""

    @property
    def stages(self) -> int:
        """Number of stages of the rings; a stage holds a block of K and of V."""
        return 2 if self.head_dim == 128 else 4

    @property
    def work(self) -> int:
        """Number of pieces of work."""
        return self.tiles * self.heads


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
    scratch = {
        **rings,
        "q_tiles": tiled((COMPUTE, ROWS, plan.head_dim), dtype),
        "out_tiles": plgpu.SMEM((COMPUTE, ROWS, plan.head_dim), dtype),
        "q_full": plgpu.Barrier(num_barriers=COMPUTE),
        "turn": plgpu.Barrier(num_arrivals=COMPUTE),
    }
    if not plan.weights_in_registers:
        scratch["weights"] = tiled((COMPUTE, ROWS, BLOCK), dtype)
    return scratch


@dataclass(frozen=True)
class _Refs:
    q: Any  # [T, N, H]
    kv_pages: Any  # i32[Z]
    tiles: Any  # i32[tiles, fields]
    out: Any  # [T, N, H]
    rings: Rings


@dataclass(frozen=True)
class _Work:
    """A sequence's part of a tile, for one query head, and the blocks of pages that it reads."""

    head: jax.Array
    token: jax.Array  # first token of the tile, in the packed batch
    begin: jax.Array  # first row of the sequence
    end: jax.Array  # its last row + 1
    position: jax.Array  # position of row 0; may be less than 0
    page: jax.Array  # where the sequence's pages begin in the list
    first: jax.Array  # first block
    count: jax.Array  # number of blocks


class _Seen(NamedTuple):
    """The running softmax of half a tile, float32."""

    weighted: jax.Array  # [64, H], the sum of weight * value
    highest: jax.Array  # [64], base-2 score
    total: jax.Array  # [64], the sum of weights


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
    refs = _Refs(q, kv_pages, tiles, out, Rings.take(k_pages, v_pages, scratch))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy_pages(plan, refs)

    @pl.when(warpgroup < COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        _compute(plan, refs, warpgroup, **scratch)


def _each_work(plan: Plan, refs: _Refs, do: Callable[[_Work, jax.Array], None]) -> jax.Array:
    """Call do(work, steps) for each piece of work of this program; return the blocks of all pieces.

    `steps` counts the blocks of the pieces before.
    """
    program = lax.axis_index("program")

    def turn(n: jax.Array, steps: jax.Array) -> jax.Array:
        start = n * plan.programs
        forth, back = start + program, start + plan.programs - 1 - program
        index = jnp.where(lax.rem(n, jnp.int32(2)) == 0, forth, back)
        work = _work(plan, refs, jnp.minimum(index, plan.work - 1))
        work = replace(work, count=jnp.where(index < plan.work, work.count, 0))
        pl.when((index < plan.work) & (work.begin < work.end))(lambda: do(work, steps))
        return steps + work.count

    return lax.fori_loop(0, pl.cdiv(plan.work, plan.programs), turn, jnp.int32(0))


def _work(plan: Plan, refs: _Refs, index: jax.Array) -> _Work:
    tile = lax.div(index, jnp.int32(plan.heads))
    head = lax.rem(index, jnp.int32(plan.heads))
    token, begin, end, position, page = (refs.tiles[tile, field] for field in range(5))
    window = plan.sliding_window
    oldest = jnp.int32(0) if window is None else jnp.maximum(position + begin - window + 1, 0)
    first = lax.div(oldest, jnp.int32(BLOCK))
    stop = lax.div(jnp.maximum(position + end, 0) + (BLOCK - 1), jnp.int32(BLOCK))
    count = jnp.where(begin < end, jnp.maximum(stop - first, 0), 0)
    return _Work(head, token, begin, end, position, page, first, count)


# The warpgroup that copies.


def _copy_pages(plan: Plan, refs: _Refs) -> None:
    def copy_work(work: _Work, steps: jax.Array) -> None:
        def page_of(entry: jax.Array) -> jax.Array:
            return refs.kv_pages[jnp.minimum(work.page + entry, plan.listed_pages - 1)]

        kv_head = lax.div(work.head, jnp.int32(plan.group))
        refs.rings.copy(kv_head, work.first, work.count, steps, page_of)

    refs.rings.drain(_each_work(plan, refs, copy_work))


# The warpgroups that compute.


def _compute(
    plan: Plan,
    refs: _Refs,
    warpgroup: jax.Array,
    *,
    q_tiles: Any,  # [2, 64, H]
    out_tiles: Any,  # [2, 64, H]
    q_full: Any,  # barriers [2]
    turn: Any,  # barrier
    weights: Any = None,  # [2, 64, C]
) -> None:
    q_tile, out_tile = q_tiles.at[warpgroup], out_tiles.at[warpgroup]
    my_weights = None if weights is None else weights.at[warpgroup]

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def compute_work(work: _Work, steps: jax.Array) -> None:
        start = pl.multiple_of(work.token + warpgroup * ROWS, ROWS)
        place = pl.ds(start, ROWS), work.head
        plgpu.copy_gmem_to_smem(refs.q.at[place], q_tile, q_full.at[warpgroup])
        plgpu.barrier_wait(q_full.at[warpgroup])
        half = _Half(plan, refs, work, steps, warpgroup, q_tile, my_weights, turn)
        seen = half.attend(take_turns)
        total = jnp.where(seen.total > 0, seen.total, jnp.ones_like(seen.total))
        out = seen.weighted * spread(1.0 / total, plan.head_dim)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_tile[...] = out.astype(out_tile.dtype)
        plgpu.commit_smem()
        _store(refs, work, out_tile, start, *half.rows)

    # The second warpgroup starts half a step behind the first.
    pl.when(warpgroup == 1)(take_turns)
    _each_work(plan, refs, compute_work)
    pl.when(warpgroup == 0)(take_turns)
    plgpu.wait_smem_to_gmem(0)


def _store(
    refs: _Refs, work: _Work, out_tile: Any, start: jax.Array, begin: jax.Array, end: jax.Array
) -> None:
    """Store the sequence's rows of half a tile; other pieces of work write the other rows."""

    @pl.when(end - begin == ROWS)
    def _() -> None:
        plgpu.copy_smem_to_gmem(out_tile, refs.out.at[pl.ds(start, ROWS), work.head])

    @pl.when(end - begin < ROWS)
    def _() -> None:
        @pl.loop(begin, end)
        def _(i: jax.Array) -> None:
            row = out_tile.at[pl.ds(i, 1)]
            plgpu.copy_smem_to_gmem(row, refs.out.at[pl.ds(start + i, 1), work.head])


@dataclass(frozen=True)
class _Half:
    """Half a tile, for which one warpgroup computes attention."""

    plan: Plan
    refs: _Refs
    work: _Work
    steps: jax.Array
    warpgroup: jax.Array
    q_tile: Any  # [64, H]
    weights: Any  # [64, C]
    turn: Any  # barrier

    @property
    def rows(self) -> tuple[jax.Array, jax.Array]:
        """Return the first row and last row + 1 of the sequence in this half."""
        base = self.warpgroup * ROWS
        return (
            jnp.clip(self.work.begin - base, 0, ROWS),
            jnp.clip(self.work.end - base, 0, ROWS),
        )

    def attend(self, take_turns: Callable[[], None]) -> _Seen:
        """Attend to all blocks of the tile. Blocks that every row sees whole need no mask. Blocks
        behind the newest row of this half are skipped, in step with the other half."""
        plan, work = self.plan, self.work
        wide, row_layout = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
        seen = _Seen(
            plgpu.layout_cast(jnp.zeros((ROWS, plan.head_dim), jnp.float32), wide),
            plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), row_layout),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout),
        )
        position = work.position + self.warpgroup * ROWS
        oldest, end = (position + row for row in self.rows)
        stop = lax.div(jnp.maximum(end, 0) + (BLOCK - 1), jnp.int32(BLOCK)) - work.first
        own_blocks = jnp.where(oldest < end, jnp.clip(stop, 0, work.count), 0)
        whole = jnp.int32(0)
        if plan.sliding_window is None:
            whole = jnp.clip(lax.div(jnp.maximum(oldest + 1, 0), jnp.int32(BLOCK)), 0, own_blocks)
        step = partial(self._step, take_turns)
        seen = lax.fori_loop(0, whole, partial(step, masked=False), seen)
        seen = lax.fori_loop(whole, own_blocks, partial(step, masked=True), seen)

        @pl.loop(own_blocks, work.count)
        def _(i: jax.Array) -> None:
            stage = lax.rem(self.steps + i, jnp.int32(plan.stages))
            for ring in (self.refs.rings.k, self.refs.rings.v):
                plgpu.barrier_wait(ring.full.at[stage])
                plgpu.barrier_arrive(ring.free.at[stage])
                take_turns()

        return seen

    def _step(
        self, take_turns: Callable[[], None], i: jax.Array, seen: _Seen, *, masked: bool
    ) -> _Seen:
        plan, k, v = self.plan, self.refs.rings.k, self.refs.rings.v
        stage, block = lax.rem(self.steps + i, jnp.int32(plan.stages)), self.work.first + i

        plgpu.barrier_wait(k.full.at[stage])

        def multiply(into: Any) -> jax.Array:
            plgpu.wgmma(into, self.q_tile, k.buffer.at[stage].transpose((1, 0)))
            take_turns()
            return into[...]

        into = plgpu.ACC((ROWS, BLOCK), jnp.float32)  # type: ignore[attr-defined]
        scores = base_two(pl.run_scoped(multiply, into), plan.scale, plan.logit_soft_cap)
        plgpu.barrier_arrive(k.free.at[stage])
        if masked:
            scores = jnp.where(self._visible(block), scores, MASKED)
        highest = jnp.maximum(seen.highest, scores.max(axis=1))
        fade = jnp.exp2(seen.highest - highest)
        weight = jnp.exp2(scores - spread(highest, BLOCK))
        weighted = seen.weighted * spread(fade, plan.head_dim)
        total = seen.total * fade + weight.sum(axis=1)
        rounded = weight.astype(self.q_tile.dtype)
        if plan.weights_in_registers:
            weighted, total, highest, rounded = lax.optimization_barrier(
                (weighted, total, highest, rounded)
            )
        else:
            self.weights[...] = rounded
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.turn)
        plgpu.barrier_wait(v.full.at[stage])
        plgpu.barrier_wait(self.turn)
        if masked:
            self._clear_unseen(stage, block)
        values = v.buffer.at[stage]
        if plan.weights_in_registers:
            weighted = accumulate(weighted, rounded, values)
        else:
            weighted = weighted + product(self.weights, values, plan.head_dim)
        plgpu.barrier_arrive(v.free.at[stage])
        return _Seen(weighted, highest, total)

    def _visible(self, block: jax.Array) -> jax.Array:
        """Return bool[64, C]: the tokens of a block that each row sees."""
        shape = (ROWS, BLOCK)
        first = self.work.position + self.warpgroup * ROWS
        behind = iota(shape, 0) + first - (iota(shape, 1) + block * BLOCK)
        visible = behind >= 0
        if self.plan.sliding_window is not None:
            visible &= behind < self.plan.sliding_window
        return visible

    def _clear_unseen(self, stage: jax.Array, block: jax.Array) -> None:
        """Clear V of tokens that no row of the tile sees: it may be NaN, which a weight of 0 does
        not remove. Each half clears the same tokens before its own product and writes the others
        unchanged, so the bytes that the other half may be reading do not change."""
        work, values = self.work, self.refs.rings.v.buffer
        stop = work.position + work.end
        window = self.plan.sliding_window
        start = jnp.int32(0) if window is None else work.position + work.begin - window + 1

        @pl.when(((block + 1) * BLOCK > stop) | (block * BLOCK < start))
        def _() -> None:
            rows = values[stage]
            token = iota((BLOCK, self.plan.head_dim), 0) + block * BLOCK
            seen = (start <= token) & (token < stop)
            values[stage] = jnp.where(seen, rows, jnp.zeros_like(rows))
            plgpu.commit_smem()
