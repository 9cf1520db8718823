"""Products of few rows on Hopper GPUs, which read a decode step's weights once.

Memory bandwidth bounds them. A block of threads takes a tile of columns. One warpgroup copies the
weights and the matching part of x into a ring in shared memory, with the tensor memory accelerator;
one or two other warpgroups multiply 64 rows each, even if fewer are filled. The ring is only as
deep as it must be: three stages of 40 KB were faster than two and than four.

Where columns are few, a pair of blocks shares a tile, and each block sums one half of the depth.
Each then sends its partner the partner's share of the columns, from registers into shared memory,
so that only the result goes to global memory. The halves are summed in one order: every run gives
the same bits. (Only pairs: not all clusters of four fit on the chip at once.)

The operations between a layer's products would cost kernels of their own, so they are fused here: a
result may be added onto the residual stream, and the rows of x may be scaled to unit root mean
square; a block sums their squares as x passes through its ring.

`product`, `add_product` and `swiglu` use this kernel. Pallas' interpreter runs all but the sends.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PROCESSORS, ROWS, spread

MOST_ROWS = 2 * ROWS
"""Most rows: at most two warpgroups compute."""

_DEPTH = 64  # depth of a stage: numbers summed in it
_TILES = (64, 128)  # columns of each side that a block may take
_RING_BYTES = 120 << 10
_BUSY = 0.8  # least share of busy processors


@dataclass(frozen=True)
class Plan:
    """The static parameters of a launch."""

    rows: int
    depth: int
    sides: int
    columns: int  # columns of a side
    tile: int  # columns of each side that a block, or a pair of blocks, takes
    splits: int = 1
    """Blocks that share a tile; each sums a part of the depth."""
    programs: int = PROCESSORS
    """Most single blocks, or most pairs. There are as many pairs as tiles: in a second tile a
    block could overwrite the sums that its partner received in the first."""
    stages: int | None = None
    """Stages of the ring; None takes a good number."""
    adds: bool = False
    """Whether the result is added onto the last operand."""
    eps: float | None = None
    """Epsilon of RMSNorm if it scales the rows of x; a block then has the whole depth."""
    joined: bool = True
    """Whether the parts are summed within a cluster. Pallas' interpreter cannot send from block to
    block; there False writes each part to memory."""

    @property
    def computes(self) -> int:
        """Number of warpgroups that compute."""
        return pl.cdiv(self.rows, ROWS)

    @property
    def rows_each(self) -> int:
        """Rows that each computing warpgroup writes."""
        return min(self.rows, ROWS)

    @property
    def tiles(self) -> int:
        """Number of tiles of columns."""
        return self.columns // self.tile

    @property
    def clusters(self) -> int:
        """Number of blocks or pairs that run; each takes one tile after another."""
        return min(self.programs, self.tiles)

    @property
    def busy(self) -> float:
        """Share of the processors that have a block, on average over the turns."""
        blocks = self.tiles * self.splits
        return blocks / (pl.cdiv(blocks, PROCESSORS) * PROCESSORS)

    @property
    def steps(self) -> int:
        """Number of stages that a tile takes."""
        return self.depth // (_DEPTH * self.splits)

    @property
    def sends(self) -> bool:
        """Whether blocks send their parts to one another."""
        return self.joined and self.splits > 1

    @property
    def scaled(self) -> bool:
        """Whether an operand gives the rows' scales."""
        return self.sides > 1 and self.eps is None

    @property
    def share(self) -> int:
        """Columns of a tile that a block writes."""
        return self.tile // self.splits if self.sends else self.tile

    @property
    def ring(self) -> int:
        """Number of stages of the ring."""
        stage = 2 * _DEPTH * (self.computes * ROWS + self.sides * self.tile)
        return self.stages or max(3, min(6, _RING_BYTES // stage))


def refusal(x: jax.Array, w: Any, columns: int) -> str | None:
    """Say why the kernel does not take x [B, K] and weights w of `columns` a side, or None."""
    rows, depth = x.shape
    if x.dtype != jnp.bfloat16 or w.dtype != x.dtype:
        return f"x and weights must both be bfloat16, not {x.dtype} and {w.dtype}"
    if rows % 8 or rows > MOST_ROWS:
        return f"rows must be a multiple of 8, at most {MOST_ROWS}, not {rows}"
    if depth % _DEPTH or columns % _TILES[0]:
        return (
            f"the depth must be a multiple of {_DEPTH} and the columns of {_TILES[0]}, "
            f"not {depth} and {columns}"
        )
    return None


def plan_of(rows: int, depth: int, sides: int, columns: int, **plan: Any) -> Plan:
    """Choose the plan that keeps most processors busy; among equals, the widest tiles, which read x
    less often.

    Args:
      **plan: fields of `Plan` to override.

    Raises:
      ValueError: eps with a product of one side, since its blocks may have half the depth.
    """
    if sides == 1 and plan.get("eps") is not None:
        raise ValueError(f"eps={plan['eps']}: must be None of a product of one side")
    plans = [
        Plan(rows, depth, sides, columns, tile, splits)
        for tile in _TILES
        for splits in ((1, 2) if sides == 1 else (1,))
        if columns % tile == 0 and depth % (_DEPTH * splits) == 0
    ]
    fitting = [x for x in plans if x.splits == 1 or x.tiles * x.splits <= PROCESSORS]
    return replace(max(fitting, key=lambda x: (round(x.busy, 1), x.tile)), **plan)


def pays(plan: Plan) -> bool:
    """Whether enough processors are busy. With 96 busy of 132, as for 6144 columns in pairs, a
    product was no faster than XLA's."""
    return plan.busy >= _BUSY


def few_rows(plan: Plan, interpret: Any, *operands: jax.Array) -> jax.Array:
    """Compute [B, N] from x [B, K] and w [K, sides, N]: the product of one side, or the SwiGLU of
    two. With `plan.scaled` an operand f32[B] scales each row's sums; with `plan.adds` the result is
    added onto the last operand, [B, N]."""
    if interpret is None or plan.splits == 1:
        return _few_rows(plan, interpret, *operands)
    given = operands[:-1] if plan.adds else operands
    parts = _few_rows(replace(plan, joined=False, adds=False), interpret, *given).sum(axis=0)
    return (parts + operands[-1] if plan.adds else parts).astype(operands[0].dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _few_rows(plan: Plan, interpret: Any, *operands: jax.Array) -> jax.Array:
    """Launch the kernel. It is jitted so that a model's layers share one lowering, of a second.

    Returns [B, N]; float32[splits, B, N] where several parts are not joined.
    """
    dtype = operands[0].dtype
    shape: tuple[int, ...] = (plan.rows, plan.columns)
    out = jax.ShapeDtypeStruct(shape, dtype)
    grid: dict[str, Any] = {
        "grid": (plan.clusters,),
        "grid_names": ("cluster",),
        "cluster": (plan.splits,),
        "cluster_names": ("split",),
    }
    if plan.splits > 1 and not plan.joined:
        out = jax.ShapeDtypeStruct((plan.splits, *shape), jnp.float32)
        grid = {"grid": (*grid["grid"], plan.splits), "grid_names": ("cluster", "split")}
    padded_rows = plan.computes * ROWS
    scratch = {
        "w_ring": _tiled((plan.ring, plan.sides, _DEPTH, plan.tile), dtype),
        "x_ring": _tiled((plan.ring, padded_rows, _DEPTH), dtype),
        "out_tiles": _tiled((plan.computes, ROWS, plan.share), out.dtype),
        "full": plgpu.Barrier(num_arrivals=plan.sides + 1, num_barriers=plan.ring),
        "free": plgpu.Barrier(num_arrivals=plan.computes, num_barriers=plan.ring),
    }
    if plan.sends:
        scratch["received"] = _tiled((plan.computes, plan.splits, ROWS, plan.share), jnp.float32)
        scratch["sent"] = plgpu.Barrier(num_arrivals=plan.splits, num_barriers=plan.computes)
    if plan.scaled:
        scratch["factors"] = plgpu.SMEM((padded_rows,), jnp.float32)
        scratch["factors_full"] = plgpu.Barrier()
    if plan.adds:
        scratch["onto_full"] = plgpu.Barrier(num_barriers=plan.computes)
    kernel = plgpu.kernel(
        partial(_body, plan),
        out_type=out,
        scratch_types=scratch,
        num_threads=plan.computes + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name=("few_rows", "few_rows_swiglu")[plan.sides - 1],
        **grid,
    )
    return kernel(*operands)


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Allocate shared memory in swizzled tiles of 8 rows of 128 bytes, or of a shorter row's
    bytes."""
    size = jnp.dtype(dtype).itemsize
    width = min(128, shape[-1] * size)
    tiles = plgpu.TilingTransform((8, width // size))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(width)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiles, swizzle))


@dataclass(frozen=True)
class _Refs:
    x: Any  # [B, K]
    w: Any  # [K, sides, N]
    scale: Any  # f32[B], or None
    onto: Any  # [B, N], or None
    out: Any  # [B, N], or float32[splits, B, N]
    w_ring: Any  # [stages, sides, 64, tile]
    x_ring: Any  # [stages, rows, 64], rows in whole warpgroups
    out_tiles: Any  # [computes, 64, share]
    full: Any  # barriers [stages]: the copies into a stage have arrived
    free: Any  # barriers [stages]: every reader is done with a stage
    received: Any = None  # f32[computes, splits, 64, share]: this block's columns of all parts
    sent: Any = None  # barriers [computes]
    factors: Any = None  # f32[rows]
    factors_full: Any = None  # barrier
    onto_full: Any = None  # barriers [computes]: `out_tiles` holds a tile of `onto`


def _body(plan: Plan, x: Any, w: Any, *rest: Any, **scratch: Any) -> None:
    scale = rest[0] if plan.scaled else None
    onto, out = rest[-2] if plan.adds else None, rest[-1]
    refs = _Refs(x, w, scale, onto, out, **scratch)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == plan.computes)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy(plan, refs)

    @pl.when(warpgroup < plan.computes)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        if plan.scaled:
            plgpu.barrier_wait(refs.factors_full)
        pl.loop(0, _turns(plan))(partial(_compute_tile, plan, refs, warpgroup))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _turns(plan: Plan) -> jax.Array:
    """Number of tiles of this block's cluster."""
    return lax.div(plan.tiles - 1 - lax.axis_index("cluster"), jnp.int32(plan.clusters)) + 1


def _tile(plan: Plan, turn: jax.Array) -> jax.Array:
    return lax.axis_index("cluster") + turn * plan.clusters


def _copy(plan: Plan, refs: _Refs) -> None:
    """Copy the weights and x into the ring; run by one warpgroup."""
    if plan.scaled:
        known_factors = refs.factors.at[pl.ds(0, plan.rows)]
        plgpu.copy_gmem_to_smem(refs.scale, known_factors, refs.factors_full)

    @pl.loop(0, _turns(plan))
    def _(turn: jax.Array) -> None:
        columns = pl.ds(pl.multiple_of(_tile(plan, turn) * plan.tile, plan.tile), plan.tile)

        @pl.loop(0, plan.steps)
        def _(i: jax.Array) -> None:
            step = turn * plan.steps + i
            stage = lax.rem(step, jnp.int32(plan.ring))
            pl.when(step >= plan.ring)(partial(plgpu.barrier_wait, refs.free.at[stage]))
            start = (lax.axis_index("split") * plan.steps + i) * _DEPTH
            depth = pl.ds(pl.multiple_of(start, _DEPTH), _DEPTH)
            for side in range(plan.sides):
                plgpu.copy_gmem_to_smem(
                    refs.w.at[depth, side, columns],
                    refs.w_ring.at[stage, side],
                    refs.full.at[stage],
                )
            rows = refs.x_ring.at[stage, pl.ds(0, plan.rows)]
            plgpu.copy_gmem_to_smem(refs.x.at[:, depth], rows, refs.full.at[stage])

    # Every arrival must be observed before the barriers go out of scope.
    steps = _turns(plan) * plan.steps
    for t in range(plan.ring):
        stage = lax.rem(steps + t, jnp.int32(plan.ring))
        pl.when(steps + t >= plan.ring)(partial(plgpu.barrier_wait, refs.free.at[stage]))


def _compute_tile(plan: Plan, refs: _Refs, warpgroup: jax.Array, turn: jax.Array) -> None:
    """Compute 64 rows of a tile; run by one warpgroup."""
    split = lax.axis_index("split")
    start = pl.multiple_of(warpgroup * ROWS, ROWS)
    first = _tile(plan, turn) * plan.tile + split * plan.share * plan.sends
    columns = pl.ds(pl.multiple_of(first, plan.share), plan.share)
    place: tuple[Any, ...] = pl.ds(start, plan.rows_each), columns
    out_tile = refs.out_tiles.at[warpgroup]
    filled = out_tile.at[pl.ds(0, plan.rows_each)]
    if plan.adds:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(refs.onto.at[place], filled, refs.onto_full.at[warpgroup])

    sums = plgpu.ACC((ROWS, plan.tile), jnp.float32)  # type: ignore[attr-defined]
    multiply = partial(_multiply, plan, refs, start, turn)
    factor, *sides = pl.run_scoped(multiply, *[sums] * plan.sides)
    out = sides[0] if plan.sides == 1 else _swiglu(factor, *sides)
    if plan.sends:
        out = _join(plan, refs, warpgroup, out)
    if plan.adds:
        plgpu.barrier_wait(refs.onto_full.at[warpgroup])
        out = out + plgpu.load(out_tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    else:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_tile[...] = out.astype(out_tile.dtype)
    plgpu.commit_smem()
    if plan.splits > 1 and not plan.joined:
        place = (split, *place)
    plgpu.copy_smem_to_gmem(filled, refs.out.at[place])


def _multiply(
    plan: Plan, refs: _Refs, start: jax.Array, turn: jax.Array, *into: Any
) -> list[jax.Array | None]:
    """Return the scales [64] of the rows from `start` on, or None, and the sums of each side."""
    row_layout = plgpu.Layout.WGMMA.reduce(1)

    def step(i: jax.Array, squares: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        stage = lax.rem(turn * plan.steps + i, jnp.int32(plan.ring))
        plgpu.barrier_wait(refs.full.at[stage])
        rows = refs.x_ring.at[stage, pl.ds(start, ROWS)]
        for side in range(plan.sides):
            plgpu.wgmma(into[side], rows, refs.w_ring.at[stage, side])
        if plan.eps is not None:
            x = plgpu.load(rows, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            squares = (squares[0] + x * x,)
        plgpu.wgmma_wait(0)
        if plan.eps is not None:
            plgpu.commit_smem()  # threads have read the rows; the next copy may overwrite them
        plgpu.barrier_arrive(refs.free.at[stage])
        return squares

    if plan.eps is None:
        lax.fori_loop(0, plan.steps, step, ())
        factor = None
        if plan.scaled:
            row_factors = refs.factors.at[pl.ds(start, ROWS)]
            factor = plgpu.load(row_factors, layout=row_layout, optimized=False)
    else:
        nothing = jnp.zeros((ROWS, _DEPTH), jnp.float32)
        nothing = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
        [squares] = lax.fori_loop(0, plan.steps, step, (nothing,))
        factor = lax.rsqrt(squares.sum(axis=1) * (1.0 / plan.depth) + plan.eps)
    return [factor, *(sums[...] for sums in into)]


def _swiglu(factor: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Compute silu(gate) * up, both scaled by `factor` [64]."""
    factors = spread(factor, gate.shape[1])
    gate, up = gate * factors, up * factors
    return gate / (1.0 + jnp.exp(-gate)) * up


def _join(plan: Plan, refs: _Refs, warpgroup: jax.Array, part: jax.Array) -> jax.Array:
    """Sum this block's share of the columns over the parts of all blocks of the cluster."""
    for peer in range(plan.splits):
        plgpu.async_store_smem(
            part[:, peer * plan.share : (peer + 1) * plan.share],
            refs.received.at[warpgroup, lax.axis_index("split")],
            refs.sent.at[warpgroup],
            cluster_idx=jnp.int32(peer),
            cluster_dim="split",
        )
    plgpu.barrier_wait(refs.sent.at[warpgroup])
    parts = [
        plgpu.load(refs.received.at[warpgroup, split], layout=plgpu.Layout.WGMMA)
        for split in range(plan.splits)
    ]
    return sum(parts[1:], start=parts[0])
