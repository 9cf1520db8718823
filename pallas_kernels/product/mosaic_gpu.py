"""A product of few rows as a Mosaic kernel for Hopper GPUs; see `pallas_kernels.few_rows`.

XLA, too, cuts the sums of narrow products into parts, but writes those to memory and sums them in a
kernel of its own. The tests interpret and lower this one; `pallas_kernels.check` runs it where
there is a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import few_rows
from pallas_kernels.hopper import ROWS

_JOINED = range(16, ROWS + 1)
"""Rows of which a product and what stands beside it are faster as one."""


def refusal(x: jax.Array, w: jax.Array) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    return few_rows.refusal(x, w, w.shape[1])


def add_refusal(y: jax.Array, w: jax.Array) -> str | None:
    """Why the kernel does not take these arguments of `add_product`, or None."""
    return refusal(y, w)


def norm_refusal(x: jax.Array, w: jax.Array) -> str | None:
    """Why the kernel does not take these arguments of `norm_product`, or None."""
    return refusal(x, w)


def pays(x: jax.Array, w: jax.Array) -> bool:
    """Whether the kernel is faster than XLA's product; only at 64 rows were both timed. At 16 XLA's
    reads nearly as fast as memory gives; at 128 a block would read twice as much of x as of the
    weights."""
    return x.shape[0] == ROWS and _busy(x, w)


def add_pays(y: jax.Array, w: jax.Array) -> bool:
    """Whether the kernel is faster than XLA's product, the sum of its parts, and `add_rms`. At 128
    rows it was slower, on an H200."""
    return y.shape[0] in _JOINED and _busy(y, w)


def norm_pays(x: jax.Array, w: jax.Array) -> bool:
    """Whether the kernel is faster than XLA's product, the sum of its parts, and the scale."""
    return x.shape[0] in _JOINED and _busy(x, w)


def _busy(x: jax.Array, w: jax.Array) -> bool:
    if refusal(x, w) is not None:
        return False
    return few_rows.pays(few_rows.plan_of(x.shape[0], w.shape[0], 1, w.shape[1]))


def product(x: jax.Array, w: jax.Array, *, interpret: Any = None, **plan: Any) -> jax.Array:
    """See `pallas_kernels.product.api.product`; arguments are taken as checked.

    Args:
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
      **plan: fields of `few_rows.Plan` that differ from what is best.
    """
    depth, columns = w.shape
    launch = few_rows.plan_of(x.shape[0], depth, 1, columns, **plan)
    return few_rows.few_rows(launch, interpret, x, w.reshape(depth, 1, columns))


def add_product(
    x: jax.Array, y: jax.Array, w: jax.Array, *, interpret: Any = None, **plan: Any
) -> jax.Array:
    """x + y @ w; see `pallas_kernels.product.api.add_product`.

    Args:
      interpret, **plan: as in `product`.
    """
    depth, columns = w.shape
    launch = few_rows.plan_of(y.shape[0], depth, 1, columns, adds=True, **plan)
    return few_rows.few_rows(launch, interpret, y, w.reshape(depth, 1, columns), x)


def norm_product(
    x: jax.Array, scale: jax.Array, w: jax.Array, *, eps: float, interpret: Any = None, **plan: Any
) -> tuple[jax.Array, jax.Array]:
    """RMSNorm(x) @ w, and ones; see `pallas_kernels.product.api.norm_product`.

    Args:
      interpret, **plan: as in `product`.
    """
    depth, columns = w.shape
    launch = few_rows.plan_of(x.shape[0], depth, 1, columns, eps=eps, **plan)
    out = few_rows.few_rows(launch, interpret, x, w.reshape(depth, 1, columns))
    return out, jnp.ones_like(scale)
