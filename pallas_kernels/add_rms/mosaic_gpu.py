"""add_rms as a Mosaic kernel for Hopper GPUs: one thread block a token.

XLA makes three kernels of it; where tokens are few, their launches cost more than their work. Tests
interpret and lower this kernel; `pallas_kernels.check` runs it where there is a GPU.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

_THREADS = 128  # threads of a warpgroup
_LONGEST = 8192  # most numbers of a token that registers hold


def refusal(x: jax.Array) -> str | None:
    """Say why the kernel does not take these arguments, or return None."""
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16, not {x.dtype}"
    if x.shape[1] % _THREADS or x.shape[1] > _LONGEST:
        return (
            f"the model dim must be a multiple of {_THREADS}, at most {_LONGEST}, not {x.shape[1]}"
        )
    return None


@partial(jax.jit, static_argnames=("eps", "interpret"))
def add_rms(
    x: jax.Array, y: jax.Array, *, eps: float, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.add_rms.api.add_rms`; arguments are already checked.

    It is jitted so that a model's layers share one lowering.

    Args:
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
    """
    tokens, dim = x.shape
    each = dim // _THREADS
    vector = next(size for size in (8, 4, 2, 1) if each % size == 0)  # numbers of one access
    layout = plgpu.Layout.WG_STRIDED((dim,), vec_size=vector)

    def body(x_ref: Any, y_ref: Any, sum_ref: Any, scale_ref: Any) -> None:
        token = lax.axis_index("token")

        def load(ref: Any) -> jax.Array:
            return plgpu.load(ref.at[token], layout=layout, optimized=False).astype(jnp.float32)

        total = (load(x_ref) + load(y_ref)).astype(x.dtype)
        sum_ref[token] = total
        rounded = total.astype(jnp.float32)
        squares = jnp.sum(rounded * rounded)
        scale_ref[token] = lax.rsqrt(squares * (1.0 / dim) + eps)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((tokens,), jnp.float32),
        ),
        grid=(tokens,),
        grid_names=("token",),
        num_threads=1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="add_rms",
    )
    return kernel(x, y)
