"""The operation between two halves of a layer: the residual sum, and the RMS scale of its tokens.

Before the next product only RMSNorm reads the sum, so one pass computes both.
"""

import jax

from pallas_kernels.dims import bind_dims, check_eps, check_floating
from pallas_kernels.implementations import Operation

PLATFORMS = {"reference": ("cpu", "gpu", "tpu"), "mosaic_gpu": ("gpu",)}
"""Platforms where each implementation runs compiled; interpreted, all run on the CPU. TPUs have no
kernel, and the reference has not been profiled there."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# The implementation that `None` lowers to on each platform, if it takes the arguments. A kernel is
# listed once `python -m pallas_kernels.check` has passed on that hardware.
_PROVEN: dict[str, str] = {"cuda": "mosaic_gpu"}

_OPERATION = Operation("add_rms", "pallas_kernels.add_rms", IMPLEMENTATIONS, _PROVEN)


def add_rms(
    x: jax.Array, y: jax.Array, *, eps: float, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return x + y, and for each token the number that scales the sum to unit root mean square.

    The sum is rounded to the type of x. The scale is 1 / sqrt(mean of squares + eps) in float32, of
    the sum before or after it is rounded.

    Args:
      x, y: [T, D], of one floating type.
      eps: >= 0.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, or the reference where no kernel takes these arguments.

    Returns:
      [T, D] in the type of x, and f32[T].

    Raises:
      ValueError: shapes, types or eps differ from the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    bind_dims(x=(x, "TD"), y=(y, "TD"))
    check_floating(x=x)
    if y.dtype != x.dtype:
        raise ValueError(f"y is {y.dtype}, but x is {x.dtype}")
    check_eps(eps)
    return _OPERATION.run(implementation, (x, y), {"eps": eps}, shown=(x,))
