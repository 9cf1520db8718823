"""Matrix products of tokens with weights, optionally added onto the residual stream."""

import jax

from pallas_kernels.add_rms.api import add_rms
from pallas_kernels.add_rms.reference import rms_scale
from pallas_kernels.dims import bind_dims, check_eps, check_floating
from pallas_kernels.implementations import Operation

PLATFORMS = {"reference": ("cpu", "gpu", "tpu"), "mosaic_gpu": ("gpu",)}
"""Platforms where each implementation runs compiled; interpreted, all run on the CPU."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# The implementation that `None` lowers to on each platform, if it takes the arguments and pays. A
# kernel is listed once it was compared with a product in float32 on that hardware.
_PROVEN: dict[str, str] = {"cuda": "mosaic_gpu"}

_OPERATION = Operation("product", "pallas_kernels.product", IMPLEMENTATIONS, _PROVEN)
_ADDING = Operation("add_product", "pallas_kernels.product", IMPLEMENTATIONS, _PROVEN)


def product(x: jax.Array, w: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Return x @ w. Sums are in float32, and float32 operands are never rounded, not even on
    accelerators that round them by default.

    Args:
      x: [T, A].
      w: [A, B], of the type of x.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, or the reference, XLA's product, wherever that is as fast.

    Returns:
      [T, B] in the type of x.

    Raises:
      ValueError: shapes or types differ from the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    bind_dims(x=(x, "TA"), w=(w, "AB"))
    _check_types(x=x, w=w)
    if implementation is None and not (
        _OPERATION.may_run("mosaic_gpu") and _OPERATION.module("mosaic_gpu").pays(x, w)
    ):
        implementation = "reference"
    return _OPERATION.run(implementation, (x, w), {}, shown=(x, w))


def add_product(
    x: jax.Array, y: jax.Array, w: jax.Array, *, eps: float, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return x + y @ w, and for each token the number that scales the sum to unit root mean square.

    The sum is the new residual stream; the next norm needs the scale. It is unspecified whether the
    product is rounded to the type of x before the sum.

    Args:
      x: [T, B].
      y: [T, A], of the type of x.
      w: [A, B], of the type of x.
      eps: epsilon of RMSNorm; >= 0.
      implementation: as in `product`, for the product with the sum behind it. Where None finds no
        faster kernel, `product` and `add_rms` run.

    Returns:
      [T, B] in the type of x, and f32[T]. After a kernel XLA computes the scale, and drops it where
      it is unused.

    Raises:
      ValueError: shapes, types or eps differ from the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    bind_dims(x=(x, "TB"), y=(y, "TA"), w=(w, "AB"))
    _check_types(x=x, y=y, w=w)
    check_eps(eps)
    if implementation is None and not adds_in_place(y, w):
        return add_rms(x, product(y, w), eps=eps)
    total = _ADDING.choose(
        implementation,
        (x, y, w),
        bound=lambda name: _ADDING.module(name).add_product,
        refusal=lambda name: _ADDING.module(name).add_refusal(y, w),
    )
    return total, rms_scale(total, eps)


def adds_in_place(y: jax.Array, w: jax.Array) -> bool:
    """Whether `add_product` is one kernel on GPUs that have it; the scale, if used, is another.
    False where the program is traced for CPUs alone."""
    return _ADDING.may_run("mosaic_gpu") and bool(_ADDING.module("mosaic_gpu").add_pays(y, w))


def _check_types(**operands: jax.Array) -> None:
    (first, x), *others = operands.items()
    check_floating(**{first: x})
    for name, other in others:
        if other.dtype != x.dtype:
            raise ValueError(f"{name} is {other.dtype}, but {first} is {x.dtype}")
