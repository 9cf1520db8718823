"""swiglu as a Mosaic kernel for Hopper GPUs: a product that ends with the SwiGLU, for the many rows
of prefill. The few rows of decode use `pallas_kernels.few_rows`.

XLA writes the product, 2F numbers a token, and reads it again; here it stays in registers. A block
of threads takes 128 rows of x by 128 columns of gate and the same 128 of up. One warpgroup copies
tiles of x and of the weights into a ring in shared memory, with the tensor memory accelerator; two
others compute 64 rows each.

Blocks of threads are persistent. The ring continues from one tile to the next, so the next tile's
operands arrive while this tile's SwiGLU is computed and its result is stored.

Tests interpret and lower the kernel; `pallas_kernels.check` runs it where there is a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import few_rows
from pallas_kernels.hopper import LOG2_E, PROCESSORS, ROWS, spread, tiled

_COMPUTE = 2  # warpgroups that compute
_TILE = _COMPUTE * ROWS  # rows of a block of threads
_COLUMNS = 128  # columns of gate, and of up
_DEPTH = 64  # depth of a stage: numbers summed in it
_FEWEST_NORMED = 16  # fewest tokens where the kernel saves the computation of the scale
_FEWEST = 1024  # fewest tokens for which the kernel was compared with XLA and won
_BUSY = 0.9  # least share of busy processors


@dataclass(frozen=True)
class Plan:
    """The static parameters of a launch."""

    tokens: int
    model_dim: int
    mlp_dim: int
    programs: int = PROCESSORS
    """Most blocks of threads."""
    stages: int = 4
    """Stages of the ring."""
    band: int = 16
    """Vertically adjacent tiles computed at about the same time, so that their weights are read
    from memory once."""
    one_product: bool = True
    """Whether gate and up are one product; Pallas' interpreter needs two."""

    @property
    def grid(self) -> tuple[int, int]:
        """Number of tiles: down, across."""
        return pl.cdiv(self.tokens, _TILE), self.mlp_dim // _COLUMNS

    @property
    def blocks(self) -> int:
        """Number of blocks of threads; each takes one tile after another."""
        down, across = self.grid
        return min(self.programs, down * across)

    @property
    def busy(self) -> float:
        """Share of the processors' time that is spent on real rows."""
        down, across = self.grid
        turns = pl.cdiv(down * across, self.programs)
        return self.tokens / _TILE * across / (turns * self.programs)

    @property
    def steps(self) -> int:
        """Number of stages that a tile takes."""
        return self.model_dim // _DEPTH


@dataclass(frozen=True)
class _Refs:
    x: Any  # [T, D]
    scale: Any  # f32[T]
    w: Any  # [D, 2, F]
    out: Any  # [T, F]
    x_ring: Any  # [stages, 128, 64]
    w_ring: Any  # [stages, 64, 2, 128]
    full: Any  # barriers [stages]: the copies into a stage have arrived
    free: Any  # barriers [stages]: every reader is done with a stage


def refusal(x: jax.Array, w_gate_up: jax.Array) -> str | None:
    """Say why the kernel does not take these arguments, or return None."""
    (tokens, model_dim), mlp_dim = x.shape, w_gate_up.shape[2]
    if tokens <= few_rows.MOST_ROWS:
        return few_rows.refusal(x, w_gate_up, mlp_dim)
    if x.dtype != jnp.bfloat16 or w_gate_up.dtype != x.dtype:
        return f"x and weights must both be bfloat16, not {x.dtype} and {w_gate_up.dtype}"
    if tokens % ROWS:
        return f"tokens must be a multiple of {ROWS}, not {tokens}"
    if model_dim % _DEPTH or mlp_dim % _COLUMNS:
        return (
            f"the model dim must be a multiple of {_DEPTH} and the MLP dim of {_COLUMNS}, "
            f"not {model_dim} and {mlp_dim}"
        )
    return None


def pays(x: jax.Array, w_gate_up: jax.Array, *, normed: bool = False) -> bool:
    """Whether the kernel is faster than XLA's product with the SwiGLU behind it.

    The kernel for many rows has one size of tiles. Where the last turn leaves processors idle, as
    with 512 rows of F = 14336, smaller tiles are better. The kernel for few rows reads no faster
    than XLA at 16 rows, but saves the computation of the scale, if the scale has no other use.
    """
    tokens = x.shape[0]
    if tokens <= few_rows.MOST_ROWS:
        fewest = _FEWEST_NORMED if normed else ROWS
        taken = tokens >= fewest and refusal(x, w_gate_up) is None
        return taken and few_rows.pays(few_rows.plan_of(tokens, *w_gate_up.shape))
    if tokens < _FEWEST or refusal(x, w_gate_up) is not None:
        return False  # a plan for arguments that the kernel does not take may have no tiles
    return Plan(tokens, x.shape[1], w_gate_up.shape[2]).busy >= _BUSY


def swiglu(
    x: jax.Array,
    scale: jax.Array,
    w_gate_up: jax.Array,
    *,
    eps: float | None = None,
    interpret: Any = None,
    **plan: Any,
) -> jax.Array:
    """See `pallas_kernels.swiglu.api.swiglu`; arguments are already checked.

    Args:
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
      **plan: fields of `Plan`, or of `few_rows.Plan`, to override.
    """
    model_dim, _, mlp_dim = w_gate_up.shape
    if x.shape[0] <= few_rows.MOST_ROWS:
        few = few_rows.plan_of(x.shape[0], *w_gate_up.shape, eps=eps, **plan)
        return few_rows.few_rows(few, interpret, x, w_gate_up, *([scale] * few.scaled))
    launch = Plan(x.shape[0], model_dim, mlp_dim, one_product=interpret is None, **plan)
    return _launch(launch, interpret, x, scale, w_gate_up)


@partial(jax.jit, static_argnums=(0, 1))
def _launch(plan: Plan, interpret: Any, *operands: jax.Array) -> jax.Array:
    """Launch the kernel. It is jitted so that a model's layers share one lowering, of a second."""
    dtype = operands[0].dtype
    tiles = plgpu.TilingTransform((8, 1, 64))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(128)  # type: ignore[abstract]
    w_ring = (plan.stages, _DEPTH, 2, _COLUMNS)
    kernel = plgpu.kernel(
        partial(_body, plan),
        out_type=jax.ShapeDtypeStruct((plan.tokens, plan.mlp_dim), dtype),
        scratch_types={
            "x_ring": tiled((plan.stages, _TILE, _DEPTH), dtype),
            "w_ring": plgpu.SMEM(w_ring, dtype, transforms=(tiles, swizzle)),
            "out_tiles": tiled((_COMPUTE, ROWS, _COLUMNS), dtype),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
            "free": plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=plan.stages),
        },
        grid=(plan.blocks,),
        grid_names=("program",),
        num_threads=_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="swiglu",
    )
    return kernel(*operands)


def _body(plan: Plan, x: Any, scale: Any, w: Any, out: Any, *, out_tiles: Any, **ring: Any) -> None:
    refs = _Refs(x, scale, w, out, **ring)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy(plan, refs)

    @pl.when(warpgroup < _COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        _compute(plan, refs, warpgroup, out_tiles.at[warpgroup])


def _each_tile(plan: Plan, do: Callable[[jax.Array, jax.Array, jax.Array], None]) -> jax.Array:
    """Call do(row, column, steps) for each tile of this block; return the stages of all tiles.

    `row` and `column` are the tile's first; `steps` counts the stages of the tiles before it.
    """
    down, across = plan.grid
    first = lax.axis_index("program")
    count = lax.div(down * across - 1 - first, jnp.int32(plan.blocks)) + 1

    @pl.loop(0, count)
    def _(n: jax.Array) -> None:
        index = first + n * plan.blocks
        row, column = plgpu.planar_snake(index, (down, across), 0, plan.band)
        do(
            pl.multiple_of(row * _TILE, _TILE),
            pl.multiple_of(column * _COLUMNS, _COLUMNS),
            n * plan.steps,
        )

    return count * plan.steps


def _copy(plan: Plan, refs: _Refs) -> None:
    """Copy tiles into the ring; run by one warpgroup."""

    def copy_tile(row: jax.Array, column: jax.Array, steps: jax.Array) -> None:
        @pl.loop(0, plan.steps)
        def _(i: jax.Array) -> None:
            stage = lax.rem(steps + i, jnp.int32(plan.stages))
            reused = steps + i >= plan.stages
            pl.when(reused)(partial(plgpu.barrier_wait, refs.free.at[stage]))
            depth = pl.ds(pl.multiple_of(i * _DEPTH, _DEPTH), _DEPTH)
            plgpu.copy_gmem_to_smem(
                refs.x.at[pl.ds(row, _TILE), depth], refs.x_ring.at[stage], refs.full.at[stage]
            )
            plgpu.copy_gmem_to_smem(
                refs.w.at[depth, :, pl.ds(column, _COLUMNS)],
                refs.w_ring.at[stage],
                refs.full.at[stage],
            )

    steps = _each_tile(plan, copy_tile)
    # Every arrival must be observed before the barriers go out of scope.
    for t in range(plan.stages):
        stage = lax.rem(steps + t, jnp.int32(plan.stages))
        pl.when(steps + t >= plan.stages)(partial(plgpu.barrier_wait, refs.free.at[stage]))


def _accumulate(plan: Plan, into: Any, rows: Any, weights: Any) -> None:
    """Add rows [64, 64] @ weights [64, 2, 128] onto `into` [64, 256]."""
    if plan.one_product:
        plgpu.wgmma(into, rows, weights.reshape(_DEPTH, 2 * _COLUMNS))
    else:
        for i in range(2):
            plgpu.wgmma(into.at[:, pl.ds(i * _COLUMNS, _COLUMNS)], rows, weights.at[:, i])


def _compute(plan: Plan, refs: _Refs, warpgroup: jax.Array, out_tile: Any) -> None:
    """Compute half of a block's rows; run by one warpgroup."""
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    own_rows = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)

    def compute_tile(row: jax.Array, column: jax.Array, steps: jax.Array) -> None:
        start = pl.multiple_of(row + warpgroup * ROWS, ROWS)
        # The accelerator reads rows beyond the last as zeros and does not write them. An ordinary
        # load must stay within the array.
        first_row = pl.multiple_of(jnp.minimum(start, plan.tokens - ROWS), ROWS)
        factor = plgpu.load(
            refs.scale.at[pl.ds(first_row, ROWS)], layout=row_layout, optimized=False
        )

        def stage(i: jax.Array | int) -> jax.Array:
            return lax.rem(steps + i, jnp.int32(plan.stages))

        def multiply(into: Any) -> jax.Array:
            @pl.loop(0, plan.steps)
            def _(i: jax.Array) -> None:
                at = stage(i)
                plgpu.barrier_wait(refs.full.at[at])
                _accumulate(plan, into, refs.x_ring.at[at, own_rows], refs.w_ring.at[at])
                plgpu.wgmma_wait(1)
                # All products but the newest have read their operands.
                pl.when(i > 0)(lambda: plgpu.barrier_arrive(refs.free.at[stage(i - 1)]))

            return into[...]

        into = plgpu.ACC((ROWS, 2 * _COLUMNS), jnp.float32)  # type: ignore[attr-defined]
        both = pl.run_scoped(multiply, into)
        plgpu.barrier_arrive(refs.free.at[stage(plan.steps - 1)])
        factors = spread(factor, _COLUMNS)
        gate, up = both[:, :_COLUMNS] * factors, both[:, _COLUMNS:] * factors
        # silu(g) = g / (1 + exp(-g)); a divisor beyond 2^60 leaves nothing of a number.
        divisor = 1.0 + jnp.exp2(jnp.minimum(gate * -LOG2_E, 60.0))
        hidden = gate * up * _inverse(divisor)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_tile[...] = hidden.astype(out_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, refs.out.at[pl.ds(start, ROWS), pl.ds(column, _COLUMNS)])

    _each_tile(plan, compute_tile)
    plgpu.wait_smem_to_gmem(0)


def _inverse(x: jax.Array) -> jax.Array:
    """Return 1 / x of numbers [64, 128] from 1 to 2^61. One inverse square root gives two inverses:
    a processor has few units for such functions, and none that divides."""
    a, b = x[:, : _COLUMNS // 2], x[:, _COLUMNS // 2 :]
    root = lax.rsqrt(a * b)
    both = root * root
    return jnp.concatenate([both * b, both * a], axis=1)
