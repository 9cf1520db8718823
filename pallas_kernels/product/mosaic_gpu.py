"""A product of few rows as a Mosaic kernel for Hopper GPUs; see `pallas_kernels.few_rows`.

XLA also splits the sums of narrow products into parts, but it writes the parts to memory and sums
them in another kernel. Tests interpret and lower this kernel; `pallas_kernels.check` runs it where
there is a GPU.
"""

from typing import Any

import jax

from pallas_kernels import few_rows
from pallas_kernels.hopper import ROWS

_ADDED = range(16, ROWS + 1)
"""Rows for which a product and the sum behind it run as one kernel. With it, and with a `swiglu`
that scales its own rows, a layer took less time at 16 and 64 rows on an H200, and more at 128."""


def refusal(x: jax.Array, w: jax.Array) -> str | None:
    """Say why the kernel does not take these arguments, or return None."""
    return few_rows.refusal(x, w, w.shape[1])


def add_refusal(y: jax.Array, w: jax.Array) -> str | None:
    """Say why the kernel does not take these arguments of `add_product`, or return None."""
    return refusal(y, w)


def pays(x: jax.Array, w: jax.Array) -> bool:
    """Whether the kernel is faster than XLA's product, as at 64 rows. At 16 rows XLA's product
    nearly reaches memory bandwidth; at 128 a block would read twice as much of x as of the
    weights."""
    return x.shape[0] == ROWS and _busy(x, w)


def add_pays(y: jax.Array, w: jax.Array) -> bool:
    """Whether the kernel replaces XLA's product, the sum of its parts, and `add_rms`."""
    return y.shape[0] in _ADDED and _busy(y, w)


def _busy(x: jax.Array, w: jax.Array) -> bool:
    if refusal(x, w) is not None:
        return False
    return few_rows.pays(few_rows.plan_of(x.shape[0], w.shape[0], 1, w.shape[1]))


def product(x: jax.Array, w: jax.Array, *, interpret: Any = None, **plan: Any) -> jax.Array:
    """See `pallas_kernels.product.api.product`; arguments are already checked.

    Args:
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
      **plan: fields of `few_rows.Plan` to override.
    """
    depth, columns = w.shape
    launch = few_rows.plan_of(x.shape[0], depth, 1, columns, **plan)
    return few_rows.few_rows(launch, interpret, x, w.reshape(depth, 1, columns))


def add_product(
    x: jax.Array, y: jax.Array, w: jax.Array, *, interpret: Any = None, **plan: Any
) -> jax.Array:
    """Return x + y @ w; see `pallas_kernels.product.api.add_product`.

    Args:
      interpret, **plan: as in `product`.
    """
    depth, columns = w.shape
    launch = few_rows.plan_of(y.shape[0], depth, 1, columns, adds=True, **plan)
    return few_rows.few_rows(launch, interpret, y, w.reshape(depth, 1, columns), x)
