"""Products of few rows on Hopper GPUs: what reads the weights of a decode step, once.

They wait for memory. A block of threads takes a tile of columns: one warpgroup copies the weights,
and what of x is multiplied with them, into a ring in shared memory, by the tensor memory
accelerator; one or two others take 64 rows each, however few there are. The ring is no deeper than
it must be: three stages of 40 KB were faster than two, and than four.

Where columns are few, a pair of blocks shares a tile, and each sums one half of the depth. Each
then sends the other one its share of the columns, from registers into the other's shared memory, so
that nothing is written to memory but the result. The halves are summed in one order: the same bits
in every run. (Pairs alone: clusters of four do not all find room on the chip at once.)

What stands between the products of a layer would cost kernels of its own, so it is done here: a
result may be added onto the residual stream, and the rows of x scaled to unit root mean square,
whose squares a block sums as x passes through its ring.

`product`, `add_product`, `norm_product` and `swiglu` are made of this. Pallas' interpreter runs all
of it but the sending.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.add_rms.reference import rms_scale
from pallas_kernels.hopper import PROCESSORS, ROWS, spread

MOST_ROWS = 2 * ROWS
"""Two warpgroups compute, at most."""

_DEPTH = 64  # of a stage: numbers that are summed
_TILES = (64, 96, 128)  # columns of each side that a block may take
_RING_BYTES = 120 << 10
_BUSY = 0.8  # of the processors, at least
_SQUARES = 8  # times that a row's sum of squares is sent: the least that a product's layout holds


@dataclass(frozen=True)
class Plan:
    """What is known of a launch before it is traced."""

    rows: int
    depth: int
    sides: int
    columns: int  # of a side
    tile: int  # columns of each side that a block, or a pair of blocks, takes
    splits: int = 1
    """Blocks that share a tile, each of which sums a part of the depth."""
    programs: int = PROCESSORS
    """Blocks that do not share their tiles, or pairs that do, at most. Pairs are as many as tiles:
    what one received would else be overwritten."""
    stages: int | None = None
    """Of the ring; None: as many as are good."""
    adds: bool = False
    """The result is added onto something."""
    eps: float | None = None
    """Of RMSNorm, if rows of x are scaled by that."""
    joined: bool = True
    """The parts are summed within a cluster, as they should be. Pallas' interpreter cannot send
    from block to block; there they go out one by one."""

    @property
    def computes(self) -> int:
        """Warpgroups that compute."""
        return pl.cdiv(self.rows, ROWS)

    @property
    def mine(self) -> int:
        """Rows that each of them has."""
        return min(self.rows, ROWS)

    @property
    def tiles(self) -> int:
        """Of columns."""
        return self.columns // self.tile

    @property
    def clusters(self) -> int:
        """Blocks or pairs that run: each takes one tile after another."""
        return min(self.programs, self.tiles)

    @property
    def busy(self) -> float:
        """Share of the processors that have a block, on average over their turns."""
        blocks = self.tiles * self.splits
        return blocks / (pl.cdiv(blocks, PROCESSORS) * PROCESSORS)

    @property
    def steps(self) -> int:
        """Stages that a tile takes."""
        return self.depth // (_DEPTH * self.splits)

    @property
    def sends(self) -> bool:
        """Whether blocks send their parts to one another."""
        return self.joined and self.splits > 1

    @property
    def scaled(self) -> bool:
        """Whether the rows' scales are an operand."""
        return self.sides > 1 and self.eps is None

    @property
    def share(self) -> int:
        """Columns of a tile that a block writes."""
        return self.tile // self.splits if self.sends else self.tile

    @property
    def ring(self) -> int:
        """Stages, as they are."""
        stage = 2 * _DEPTH * (self.computes * ROWS + self.sides * self.tile)
        return self.stages or max(3, min(6, _RING_BYTES // stage))


def refusal(x: jax.Array, w: Any, columns: int) -> str | None:
    """Why the kernel does not take x [B, K] and weights w of so many columns a side, or None."""
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
    """The plan that keeps most processors busy, and then the one of the widest tiles, which read x
    less often.

    Args:
      **plan: fields of `Plan` that differ from what is best.
    """
    plans = [
        Plan(rows, depth, sides, columns, tile, splits)
        for tile in _TILES
        for splits in ((1, 2) if sides == 1 else (1,))
        if columns % tile == 0 and depth % (_DEPTH * splits) == 0
    ]
    fitting = [x for x in plans if x.splits == 1 or x.tiles * x.splits <= PROCESSORS]
    return replace(max(fitting, key=lambda x: (round(x.busy, 1), x.tile)), **plan)


def pays(plan: Plan) -> bool:
    """Whether enough processors are busy: with 96 of 132, as 6144 columns keep in pairs, a product
    was no faster than XLA's."""
    return plan.busy >= _BUSY


def few_rows(plan: Plan, interpret: Any, *operands: jax.Array) -> jax.Array:
    """[B, N] of x [B, K] and w [K, sides, N]: their product, or of two sides the SwiGLU of both.

    Args:
      operands: x and w; with `plan.scaled` f32[B] to scale each row's sums; with `plan.adds` what
        the result is added onto, [B, N].
    """
    if interpret is None or plan.splits == 1:
        return _few_rows(plan, interpret, *operands)
    x, *others = operands
    onto = others.pop() if plan.adds else 0
    cut = replace(plan, joined=False, adds=False, eps=None)
    out = _few_rows(cut, interpret, x, *others).sum(axis=0)
    if plan.eps is not None:
        out = out * rms_scale(x, plan.eps)[:, None]
    return (out + onto).astype(x.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _few_rows(plan: Plan, interpret: Any, *operands: jax.Array) -> jax.Array:
    """A function of its own, so that a model's layers share one lowering: it takes a second.

    Returns [B, N], or of several parts that are not joined float32[splits, B, N].
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
    tall = plan.computes * ROWS
    scratch: dict[str, Any] = {
        "w_ring": _tiled((plan.ring, plan.sides, _DEPTH, plan.tile), dtype),
        "x_ring": _tiled((plan.ring, tall, _DEPTH), dtype, like=plan.tile),
        "out_tiles": _tiled((plan.computes, ROWS, plan.share), out.dtype),
        "full": plgpu.Barrier(num_arrivals=plan.sides + 1, num_barriers=plan.ring),
        "free": plgpu.Barrier(num_arrivals=plan.computes, num_barriers=plan.ring),
    }
    if plan.sends:
        scratch["received"] = _tiled((plan.computes, plan.splits, ROWS, plan.share), jnp.float32)
        arrivals = plan.splits * (1 if plan.eps is None else 2)
        scratch["sent"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.computes)
    if plan.sends and plan.eps is not None:
        shape = (plan.computes, plan.splits, ROWS, _SQUARES)
        scratch["squares"] = _tiled(shape, jnp.float32)
    if plan.scaled:
        scratch["factors"] = plgpu.SMEM((tall,), jnp.float32)
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


def _tiled(shape: tuple[int, ...], dtype: Any, like: int | None = None) -> Any:
    """Shared memory in swizzled tiles of 8 rows of 128 bytes, or of fewer if those fill no row;
    with `like`, those of rows of so many numbers: operands of a product must be alike."""
    size = jnp.dtype(dtype).itemsize
    width = math.gcd(128, (like or shape[-1]) * size)
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
    squares: Any = None  # f32[computes, splits, 64, _]: of the rows' parts, in all columns
    factors: Any = None  # f32[rows]
    factors_full: Any = None  # barrier
    onto_full: Any = None  # barriers [computes]: what is added onto lies in `out_tiles`


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
    """Tiles of this block's cluster."""
    return lax.div(plan.tiles - 1 - lax.axis_index("cluster"), jnp.int32(plan.clusters)) + 1


def _tile(plan: Plan, turn: jax.Array) -> jax.Array:
    return lax.axis_index("cluster") + turn * plan.clusters


def _copy(plan: Plan, refs: _Refs) -> None:
    """The warpgroup that copies."""
    if plan.scaled:
        known = refs.factors.at[pl.ds(0, plan.rows)]
        plgpu.copy_gmem_to_smem(refs.scale, known, refs.factors_full)

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
    """A warpgroup that computes: 64 rows of a tile."""
    split = lax.axis_index("split")
    start = pl.multiple_of(warpgroup * ROWS, ROWS)
    first = _tile(plan, turn) * plan.tile + split * plan.share * plan.sends
    columns = pl.ds(pl.multiple_of(first, plan.share), plan.share)
    place: tuple[Any, ...] = pl.ds(start, plan.mine), columns
    mine = refs.out_tiles.at[warpgroup]
    ours = mine.at[pl.ds(0, plan.mine)]
    if plan.adds:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(refs.onto.at[place], ours, refs.onto_full.at[warpgroup])

    sums = plgpu.ACC((ROWS, plan.tile), jnp.float32)  # type: ignore[attr-defined]
    multiply = partial(_multiply, plan, refs, start, turn)
    squares, *sides = pl.run_scoped(multiply, *[sums] * plan.sides)
    if plan.sends:
        squares, sides[0] = _join(plan, refs, warpgroup, squares, sides[0])
    factor = _factor(plan, refs, start, squares)
    if factor is not None:
        sides = [side * spread(factor, side.shape[1]) for side in sides]
    out = sides[0] if plan.sides == 1 else _swiglu(*sides)
    if plan.adds:
        plgpu.barrier_wait(refs.onto_full.at[warpgroup])
        out = out + plgpu.load(mine, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    else:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    mine[...] = out.astype(mine.dtype)
    plgpu.commit_smem()
    if plan.splits > 1 and not plan.joined:
        place = (split, *place)
    plgpu.copy_smem_to_gmem(ours, refs.out.at[place])


def _multiply(
    plan: Plan, refs: _Refs, start: jax.Array, turn: jax.Array, *into: Any
) -> list[jax.Array | None]:
    """The sums of squares of the 64 rows from `start` on, [64], if they are asked for, and the sums
    of each side."""

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
            plgpu.commit_smem()  # what threads have read, the next copy may write over
        plgpu.barrier_arrive(refs.free.at[stage])
        return squares

    if plan.eps is None:
        lax.fori_loop(0, plan.steps, step, ())
        return [None, *(sums[...] for sums in into)]
    nothing = jnp.zeros((ROWS, _DEPTH), jnp.float32)
    nothing = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
    [squares] = lax.fori_loop(0, plan.steps, step, (nothing,))
    return [squares.sum(axis=1), *(sums[...] for sums in into)]


def _factor(
    plan: Plan, refs: _Refs, start: jax.Array, squares: jax.Array | None
) -> jax.Array | None:
    """What scales the 64 rows from `start` on, [64], if anything does."""
    if squares is not None and plan.eps is not None:
        return lax.rsqrt(squares * (1.0 / plan.depth) + plan.eps)
    if not plan.scaled:
        return None
    known = refs.factors.at[pl.ds(start, ROWS)]
    return plgpu.load(known, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up."""
    return gate / (1.0 + jnp.exp(-gate)) * up


def _join(
    plan: Plan, refs: _Refs, warpgroup: jax.Array, squares: jax.Array | None, part: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """The rows' squares, if they are asked for, and this block's share of the columns, summed over
    the parts of all blocks of the cluster."""
    layout, split = plgpu.Layout.WGMMA, lax.axis_index("split")

    def send(x: jax.Array, to: Any, peer: int) -> None:
        plgpu.async_store_smem(
            x,
            to.at[warpgroup, split],
            refs.sent.at[warpgroup],
            cluster_idx=jnp.int32(peer),
            cluster_dim="split",
        )

    def received(by: Any) -> jax.Array:
        parts = [plgpu.load(by.at[warpgroup, peer], layout=layout) for peer in range(plan.splits)]
        return sum(parts[1:], start=parts[0])

    for peer in range(plan.splits):
        send(part[:, peer * plan.share : (peer + 1) * plan.share], refs.received, peer)
        if squares is not None:
            send(spread(squares, _SQUARES), refs.squares, peer)
    plgpu.barrier_wait(refs.sent.at[warpgroup])
    if squares is not None:
        squares = received(refs.squares).max(axis=1)  # all columns are the same
    return squares, received(refs.received)
