"""What the blocks of threads of `layer_products` do.

Of a block's warpgroups one or two compute, one copies activations, and one copies weights. The last
waits for nobody but the ring: while the others wait until every block has written what the next
product reads, it fills the ring with that product's weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ROWS, spread
from pallas_kernels.layer_products.mosaic_gpu_plan import BOXES, COLUMNS, DEPTH, Plan, Product

PIECE = 64  # columns of a tile that leave at once
_THREADS = 128  # of a warpgroup
_LONGEST = 2048  # columns of a row that are summed at once where no scale is taken of all

Steps = tuple[tuple[str, int], ...]
"""See `Plan.steps`."""


@dataclass(frozen=True)
class Refs:
    """Everything that a kernel touches."""

    o: Any  # [B, N * H]
    x: Any  # [B, D]
    weights: tuple[Any, ...]  # of each product: [A, C], of gate and up [D, 2, F]
    counters: Any  # i32[steps]: arrivals
    parts: tuple[Any, ...]  # of each product: f32[splits, padded, C]; None of gate and up
    x1: Any  # [padded, D]
    scale1: Any  # f32[tall]
    hidden: Any  # [padded, F]
    x2: Any  # [B, D], which the next product reads, too
    scale2: Any  # f32[B]
    qkv: Any  # [B, C], or None
    w_ring: Any  # [stages, 2, 64, 128]
    w_full: Any  # barriers [stages]: the copies into a stage have arrived
    w_free: Any  # barriers [stages]: every reader is done with a stage
    x_ring: Any  # [x_stages * padded and what is missing to whole warpgroups, 64]
    x_full: Any
    x_free: Any
    sums: Any  # f32[computes, 64, 64], on their way out
    hidden_tiles: Any  # [computes, 64, 64], on their way out


def body(plan: Plan, steps: Steps, refs: Refs) -> None:
    """A block of threads."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == plan.computes + 1)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy_weights(plan, steps, refs)

    @pl.when(warpgroup == plan.computes)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy_rows(plan, steps, refs)

    @pl.when(warpgroup < plan.computes)
    def _() -> None:
        plgpu.set_max_registers(208, action="increase")
        _compute(plan, steps, refs, warpgroup)


@dataclass(frozen=True)
class _Unit:
    """A unit of work."""

    tile: jax.Array  # of columns
    split: jax.Array
    first: jax.Array  # stage of the depth
    count: jax.Array  # of stages


@dataclass(frozen=True)
class _Before:
    """Stages that were counted before, of each ring."""

    w: jax.Array
    x: jax.Array


_Do = Callable[[_Unit, _Before], None]


def _each_unit(plan: Plan, product: Product, before: _Before, do: _Do) -> _Before:
    """do(unit, stages before it) for each unit of this block. Returns the stages after all."""
    block = lax.axis_index("block")
    turns = lax.div(product.units + plan.blocks - 1 - block, jnp.int32(plan.blocks))

    def turn(n: jax.Array, counted: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tile, split = _divided(block + n * plan.blocks, product.splits)
        first, end = (
            lax.div(at * product.steps, jnp.int32(product.splits)) for at in (split, split + 1)
        )
        do(_Unit(tile, split, first, end - first), _Before(*counted))
        w, x = counted
        return w + (end - first), x + (end - first) * product.below

    return _Before(*lax.fori_loop(0, turns, turn, (before.w, before.x)))


def _each_product(plan: Plan, steps: Steps, do: Callable[[int, int], _Do]) -> _Before:
    """do(at, index)(unit, stages before it) for each unit of each product: `at` is that of the
    step. Returns the stages after all."""
    before = _Before(jnp.int32(0), jnp.int32(0))
    for at, (kind, index) in enumerate(steps):
        if kind == "product":
            before = _each_unit(plan, plan.products[index], before, do(at, index))
    return before


def _copy_weights(plan: Plan, steps: Steps, refs: Refs) -> None:
    """The warpgroup that copies weights."""
    size = jnp.int32(plan.ring)

    def copy(product: Product, w: Any, unit: _Unit, before: _Before) -> None:
        @pl.loop(0, unit.count)
        def _(i: jax.Array) -> None:
            step = before.w + i
            stage = lax.rem(step, size)
            pl.when(step >= plan.ring)(partial(plgpu.barrier_wait, refs.w_free.at[stage]))
            for box in range(BOXES):
                plgpu.copy_gmem_to_smem(
                    w.at[_box(product, unit, i, box)],
                    refs.w_ring.at[stage, box],
                    refs.w_full.at[stage],
                )

    done = _each_product(
        plan,
        steps,
        lambda _, index: partial(copy, plan.products[index], refs.weights[index]),
    )
    _drain(done.w, plan.ring, refs.w_free)


def _box(product: Product, unit: _Unit, i: jax.Array, box: int) -> tuple[Any, ...]:
    """Where a box of a unit's i-th stage lies in the weights."""
    below = product.below
    beside = product.width // COLUMNS
    row = ((unit.first + i) * below + box % below) * DEPTH
    column = (unit.tile * beside + box % beside) * COLUMNS
    rows = pl.ds(pl.multiple_of(row, DEPTH), DEPTH)
    columns = pl.ds(pl.multiple_of(column, COLUMNS), COLUMNS)
    return (rows, box, columns) if product.sides > 1 else (rows, columns)


def _copy_rows(plan: Plan, steps: Steps, refs: Refs) -> None:
    """The warpgroup that copies activations."""
    targets = _targets(plan, steps, refs)
    sources = refs.o, refs.x1, refs.hidden, refs.x2
    size = jnp.int32(plan.x_ring)

    def copy(product: Product, source: Any, unit: _Unit, before: _Before) -> None:
        @pl.loop(0, unit.count * product.below)
        def _(i: jax.Array) -> None:
            step = before.x + i
            stage = lax.rem(step, size)
            pl.when(step >= plan.x_ring)(partial(plgpu.barrier_wait, refs.x_free.at[stage]))
            start = pl.multiple_of((unit.first * product.below + i) * DEPTH, DEPTH)
            # From a traced start: there may be fewer rows, and those read as zeros.
            rows = pl.ds(0 * unit.tile, plan.padded)
            plgpu.copy_gmem_to_smem(
                source.at[rows, pl.ds(start, DEPTH)],
                refs.x_ring.at[pl.ds(pl.multiple_of(stage * plan.padded, 8), plan.padded)],
                refs.x_full.at[stage],
            )

    def of_product(at: int, index: int) -> _Do:
        if plan.fused and at > 0:
            _await(refs.counters, at - 1, targets)
        return partial(copy, plan.products[index], sources[index])

    done = _each_product(plan, steps, of_product)
    _drain(done.x, plan.x_ring, refs.x_free)


def _drain(steps: jax.Array, size: int, free: Any) -> None:
    """After so many stages in all: every arrival must be observed before the barriers go out of
    scope."""
    for t in range(size):
        stage = lax.rem(steps + t, jnp.int32(size))
        pl.when(steps + t >= size)(partial(plgpu.barrier_wait, free.at[stage]))


def _compute(plan: Plan, steps: Steps, refs: Refs, warpgroup: jax.Array) -> None:
    """A warpgroup that computes: 64 rows of a unit."""
    targets = _targets(plan, steps, refs)
    before = _Before(jnp.int32(0), jnp.int32(0))
    for at, (kind, index) in enumerate(steps):
        product = plan.products[index]
        if kind == "product":
            unit = partial(_compute_unit, plan, refs, warpgroup, index)
            before = _each_unit(plan, product, before, unit)
            plgpu.wait_smem_to_gmem(0)
            if plan.fused:
                busy = lax.axis_index("block") < product.blocks(plan.blocks)
                pl.when(busy)(partial(_arrive, refs.counters, at))
        elif index == 3:
            if plan.fused:
                _await(refs.counters, at - 1, targets)
            _sum_pieces(plan, refs, warpgroup)
        else:
            mine = (warpgroup == 0) & (lax.axis_index("block") < plan.rows)

            @pl.when(mine)
            def _(at: int = at, index: int = index) -> None:
                if plan.fused:
                    _await(refs.counters, at - 1, targets)
                _sum_rows(plan, refs, index)
                if plan.fused:
                    _arrive(refs.counters, at)


def _compute_unit(
    plan: Plan, refs: Refs, warpgroup: jax.Array, index: int, unit: _Unit, before: _Before
) -> None:
    product = plan.products[index]
    start = pl.multiple_of(warpgroup * ROWS, ROWS)

    def multiply(*into: Any) -> list[jax.Array]:
        @pl.loop(0, unit.count)
        def _(i: jax.Array) -> None:
            stage = lax.rem(before.w + i, jnp.int32(plan.ring))
            plgpu.barrier_wait(refs.w_full.at[stage])
            x_stages = [
                lax.rem(before.x + i * product.below + n, jnp.int32(plan.x_ring))
                for n in range(product.below)
            ]
            for box in range(BOXES):
                x_stage = x_stages[box % product.below]
                if box < product.below:
                    plgpu.barrier_wait(refs.x_full.at[x_stage])
                first = pl.multiple_of(x_stage * plan.padded + start, 8)
                rows = refs.x_ring.at[pl.ds(first, ROWS)]
                plgpu.wgmma(into[box % len(into)], rows, refs.w_ring.at[stage, box])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs.w_free.at[stage])
            for x_stage in x_stages:
                plgpu.barrier_arrive(refs.x_free.at[x_stage])

        return [sums[...] for sums in into]

    sums = plgpu.ACC((ROWS, COLUMNS), jnp.float32)  # type: ignore[attr-defined]
    boxes = pl.run_scoped(multiply, *[sums] * (BOXES // product.below))
    rows = pl.ds(start, plan.mine)
    if product.sides > 1:
        _leave(
            plan,
            refs.hidden_tiles.at[warpgroup],
            _swiglu(refs, start, *boxes),
            refs.hidden,
            (rows,),
            unit.tile * COLUMNS,
        )
        return
    for n, part in enumerate(boxes):
        column = (unit.tile * len(boxes) + n) * COLUMNS
        _leave(plan, refs.sums.at[warpgroup], part, refs.parts[index], (unit.split, rows), column)


def _swiglu(refs: Refs, start: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up of both, scaled."""
    tall = plgpu.Layout.WGMMA.reduce(1)
    factor = plgpu.load(refs.scale1.at[pl.ds(start, ROWS)], layout=tall, optimized=False)
    factors = spread(factor, COLUMNS)
    gate, up = gate * factors, up * factors
    return gate / (1.0 + jnp.exp(-gate)) * up


def _leave(
    plan: Plan, tile: Any, values: jax.Array, target: Any, place: tuple[Any, ...], column: jax.Array
) -> None:
    """Writes [64, columns], as many rows as there are, by way of a tile in shared memory."""
    for at in range(0, values.shape[1], PIECE):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile[...] = values[:, at : at + PIECE].astype(tile.dtype)
        plgpu.commit_smem()
        columns = pl.ds(pl.multiple_of(column + at, PIECE), PIECE)
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, plan.mine)], target.at[(*place, columns)])


def _sum_rows(plan: Plan, refs: Refs, index: int) -> None:
    """The residual sum of this block's rows, and its RMS scale."""
    residual, total, scale = (
        (refs.x, refs.x1, refs.scale1) if index == 0 else (refs.x1, refs.x2, refs.scale2)
    )
    dim = plan.model_dim

    @pl.loop(lax.axis_index("block"), plan.rows, step=plan.blocks)
    def _(row: jax.Array) -> None:
        layout = _strided(dim)
        y = _sum_parts(refs.parts[index], row, pl.ds(0, dim)).astype(total.dtype)
        x = plgpu.load(residual.at[row], layout=layout, optimized=False)
        rounded = (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(total.dtype)
        total[row] = rounded
        exact = rounded.astype(jnp.float32)
        scale[row] = lax.rsqrt(jnp.sum(exact * exact) * (1.0 / dim) + plan.eps)


def _sum_pieces(plan: Plan, refs: Refs, warpgroup: jax.Array) -> None:
    """The parts of QKV, pieces of rows dealt out to all warpgroups that compute."""
    dim = plan.qkv_dim
    piece = max(x for x in range(_THREADS, min(dim, _LONGEST) + 1, _THREADS) if dim % x == 0)
    worker = lax.axis_index("block") * plan.computes + warpgroup

    @pl.loop(worker, plan.rows * (dim // piece), step=plan.blocks * plan.computes)
    def _(at: jax.Array) -> None:
        row, column = _divided(at, dim // piece)
        columns = pl.ds(pl.multiple_of(column * piece, piece), piece)
        total = _sum_parts(refs.parts[-1], row, columns)
        refs.qkv[row, columns] = total.astype(refs.qkv.dtype)


def _sum_parts(parts: Any, row: jax.Array, columns: Any) -> jax.Array:
    """f32[columns] of a row: always in the same order."""
    layout = _strided(columns.size)
    first, *others = (
        plgpu.load(parts.at[split, row, columns], layout=layout, optimized=False)
        for split in range(parts.shape[0])
    )
    return sum(others, start=first)


def _strided(size: int) -> Any:
    """The layout of a row over a warpgroup."""
    vector = next(n for n in (4, 2, 1) if size // _THREADS % n == 0)  # numbers of one access
    return plgpu.Layout.WG_STRIDED((size,), vec_size=vector)


def _divided(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def _targets(plan: Plan, steps: Steps, refs: Refs) -> list[jax.Array]:
    """What each step's counter shows once all have arrived.

    Counters are never set back: before a call each is a multiple of the arrivals that one call
    makes, and while this block has not arrived it cannot have reached the next.
    """
    if not plan.fused:
        return []
    counts = [plan.arrivals(*step) for step in steps]
    seen = [refs.counters[at] for at in range(len(steps))]
    return [x - lax.rem(x, jnp.int32(count)) + count for x, count in zip(seen, counts, strict=True)]


def _arrive(counters: Any, at: int) -> None:
    """Says that this warpgroup has written what it had to."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def arrive(_: Any, counter: Any) -> None:
        # Written as usual, to be read by the tensor memory accelerator.
        mosaic.inline_ptx("fence.proxy.async;", has_side_effects=True)
        mosaic.warpgroup_barrier()
        mosaic.SemaphoreRef(mosaic.memref_ptr(counter)).signal(1, memory_scope="gpu")

    arrive(counters.at[pl.ds(at, 1)])


def _await(counters: Any, at: int, targets: list[jax.Array]) -> None:
    """Waits for everything that a step writes."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait(_: Any, counter: Any, target: Any) -> None:
        semaphore = mosaic.SemaphoreRef(mosaic.memref_ptr(counter))
        semaphore.wait(target.registers.item(), decrement=False, memory_scope="gpu")
        mosaic.inline_ptx("fence.proxy.async;", has_side_effects=True)

    wait(counters.at[pl.ds(at, 1)], targets[at])
