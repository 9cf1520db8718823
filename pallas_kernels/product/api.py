"""A matrix product: tokens by a matrix of weights."""

import jax

from pallas_kernels.dims import bind_dims, check_floating
from pallas_kernels.implementations import Operation

PLATFORMS = {"reference": ("cpu", "gpu", "tpu"), "mosaic_gpu": ("gpu",)}
"""Where each implementation runs compiled; interpreted they all run on the CPU."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# What `implementation=None` lowers to on each platform, where it takes the arguments and pays. A
# kernel enters when it has been held against a product in float32 on that hardware.
_PROVEN: dict[str, str] = {"cuda": "mosaic_gpu"}

_OPERATION = Operation("product", "pallas_kernels.product", IMPLEMENTATIONS, _PROVEN)


def product(x: jax.Array, w: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """x @ w. Sums are taken in float32, and float32 stays float32 also on accelerators that would
    otherwise round it.

    Args:
      x: [T, A].
      w: [A, B], of the type of x.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, which is the reference, XLA's product, wherever that is as fast.

    Returns:
      [T, B] in the type of x.

    Raises:
      ValueError: shapes or types contradict the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    bind_dims(x=(x, "TA"), w=(w, "AB"))
    check_floating(x=x)
    if w.dtype != x.dtype:
        raise ValueError(f"w is {w.dtype}, but x is {x.dtype}")
    if implementation is None and not _OPERATION.module("mosaic_gpu").pays(x, w):
        implementation = "reference"
    return _OPERATION.run(implementation, (x, w), {}, shown=(x, w))
