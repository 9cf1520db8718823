"""A layer's products as one Mosaic kernel for Hopper GPUs, for the few rows of decode.

They wait for memory, and between kernels memory waits: one kernel ends, its successor begins, and
the first weights are on their way for a microsecond. Here blocks of threads stay for the whole
layer. Weights depend on nothing, so that a block's copies of them run on into the next product
while the results of this one are still being written, summed and waited for: the ring in shared
memory holds what memory gives in 6 us.

Products of one side are cut into parts along the depth, so that every block has as much to read,
and parts go through memory in float32; rows are dealt out to blocks that sum them, always in the
same order. Between the steps every block waits for all that write what it reads: a counter in
memory, for each step. All blocks must be on the chip at once, so there are no more than processors.

Pallas' interpreter runs one block after another; there each step is a kernel.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.few_rows import MOST_ROWS
from pallas_kernels.hopper import ROWS, tiled
from pallas_kernels.layer_products.mosaic_gpu_body import PIECE, Refs, Steps, body
from pallas_kernels.layer_products.mosaic_gpu_plan import BOXES, COLUMNS, DEPTH, Plan

_COUNTERS = 8
_UNIT = 128  # of every dimension
_LONGEST = 8192  # numbers of a token that a warpgroup's registers hold


def refusal(
    o: jax.Array,
    x: jax.Array,
    wo: jax.Array,
    w_gate_up: jax.Array,
    w_down: jax.Array,
    wqkv: jax.Array | None = None,
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    del w_gate_up
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, not {x.dtype}"
    if x.shape[0] > MOST_ROWS:
        return f"there may be at most {MOST_ROWS} tokens, not {x.shape[0]}"
    dims = [o.shape[1], x.shape[1], w_down.shape[0], *(() if wqkv is None else wqkv.shape[1:])]
    if any(dim % _UNIT for dim in dims):
        return f"every dimension must be a multiple of {_UNIT}, not {', '.join(map(str, dims))}"
    if wo.shape[1] > _LONGEST:
        return f"the model dim must be at most {_LONGEST}, not {wo.shape[1]}"
    return None


def pays(*operands: jax.Array) -> bool:
    """Whether the kernel is faster than a kernel for each product."""
    del operands
    return False


def layer_products(
    o: jax.Array,
    x: jax.Array,
    wo: jax.Array,
    w_gate_up: jax.Array,
    w_down: jax.Array,
    wqkv: jax.Array | None = None,
    *,
    eps: float,
    interpret: Any = None,
    **plan: Any,
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.layer_products.api.layer_products`; arguments are taken as checked.

    Args:
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
      **plan: fields of `Plan` that differ from what is best.
    """
    launch = Plan(
        rows=x.shape[0],
        heads_dim=o.shape[1],
        model_dim=x.shape[1],
        mlp_dim=w_down.shape[0],
        qkv_dim=0 if wqkv is None else wqkv.shape[1],
        eps=eps,
        fused=interpret is None,
        **plan,
    )
    weights = (wo, w_gate_up, w_down) if wqkv is None else (wo, w_gate_up, w_down, wqkv)
    counters = jnp.zeros((_COUNTERS,), jnp.int32)
    return _launch(launch, interpret, counters, o, x, *weights)[1:]


@partial(jax.jit, static_argnums=(0, 1))
def _launch(
    plan: Plan, interpret: Any, counters: jax.Array, o: jax.Array, x: jax.Array, *weights: jax.Array
) -> tuple[jax.Array, ...]:
    """A function of its own, so that a model's layers share one lowering.

    Returns the counters, the residual stream, its scale and, if there is one, the next QKV.
    """
    dtype = x.dtype

    def memory(*shape: int, of: Any = dtype) -> Any:
        return jax.new_ref(lax.empty(shape, of))

    counts = jax.new_ref(counters)
    parts = tuple(
        memory(product.splits, plan.padded, product.columns, of=jnp.float32)
        for i, product in enumerate(plan.products)
        if i != 1
    )
    between = (
        memory(plan.padded, plan.model_dim),
        memory(plan.tall, of=jnp.float32),
        memory(plan.padded, plan.mlp_dim),
    )
    results: tuple[Any, ...] = (
        memory(plan.rows, plan.model_dim),
        memory(plan.rows, of=jnp.float32),
    )
    if plan.qkv_dim:
        results = (*results, memory(plan.rows, plan.qkv_dim))
    for steps in (plan.steps,) if plan.fused else ((step,) for step in plan.steps):
        _kernel(plan, interpret, steps, dtype)(counts, o, x, *weights, *parts, *between, *results)
    return jax.freeze(counts), *(jax.freeze(ref) for ref in results)


def _kernel(plan: Plan, interpret: Any, steps: Steps, dtype: Any) -> Any:
    """Of some of the plan's steps."""
    rings = {
        "w_ring": tiled((plan.ring, BOXES, DEPTH, COLUMNS), dtype),
        "w_full": plgpu.Barrier(num_arrivals=BOXES, num_barriers=plan.ring),
        "w_free": plgpu.Barrier(num_arrivals=plan.computes, num_barriers=plan.ring),
        "x_ring": tiled(((plan.x_ring - 1) * plan.padded + plan.tall, DEPTH), dtype),
        "x_full": plgpu.Barrier(num_barriers=plan.x_ring),
        "x_free": plgpu.Barrier(num_arrivals=plan.computes, num_barriers=plan.x_ring),
        "sums": tiled((plan.computes, ROWS, PIECE), jnp.float32),
        "hidden_tiles": tiled((plan.computes, ROWS, PIECE), dtype),
    }
    return plgpu.kernel(
        partial(_with_refs, plan, steps),
        scratch_types=rings,
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=plan.computes + 2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="layer_products",
    )


def _with_refs(
    plan: Plan, steps: Steps, counters: Any, o: Any, x: Any, *rest: Any, **scratch: Any
) -> None:
    count = len(plan.products)
    weights, rest = rest[:count], rest[count:]
    parts, rest = rest[: count - 1], rest[count - 1 :]
    x1, scale1, hidden, x2, scale2, *qkv = rest
    refs = Refs(
        o,
        x,
        weights,
        counters,
        (parts[0], None, *parts[1:]),
        x1,
        scale1,
        hidden,
        x2,
        scale2,
        qkv[0] if qkv else None,
        **scratch,
    )
    body(plan, steps, refs)
