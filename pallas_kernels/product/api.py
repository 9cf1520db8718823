"""Matrix products: tokens by a matrix of weights, also onto the residual stream."""

from functools import partial

import jax

from pallas_kernels.add_rms.api import add_rms
from pallas_kernels.add_rms.reference import rms_scale
from pallas_kernels.dims import bind_dims, check_eps, check_float32, check_floating
from pallas_kernels.implementations import Operation

PLATFORMS = {"reference": ("cpu", "gpu", "tpu"), "mosaic_gpu": ("gpu",)}
"""Where each implementation runs compiled; interpreted they all run on the CPU."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# What `implementation=None` lowers to on each platform, where it takes the arguments and pays. A
# kernel enters when it has been held against a product in float32 on that hardware.
_PROVEN: dict[str, str] = {"cuda": "mosaic_gpu"}

_OPERATION = Operation("product", "pallas_kernels.product", IMPLEMENTATIONS, _PROVEN)
_NORMED = Operation("norm_product", "pallas_kernels.product", IMPLEMENTATIONS, _PROVEN)
_ADDING = Operation("add_product", "pallas_kernels.product", IMPLEMENTATIONS, _PROVEN)


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
    _check_types(x=x, w=w)
    if implementation is None and not _OPERATION.module("mosaic_gpu").pays(x, w):
        implementation = "reference"
    return _OPERATION.run(implementation, (x, w), {}, shown=(x, w))


def add_product(
    x: jax.Array, y: jax.Array, w: jax.Array, *, eps: float, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """x + y @ w, and for each token the number that scales it to unit root mean square: what a
    product gives back to the residual stream, and what the next norm needs of that.

    Args:
      x: [T, B].
      y: [T, A], of the type of x.
      w: [A, B], likewise.
      eps: of RMSNorm; >= 0.
      implementation: of the product with the sum behind it, as in `product`. Where None finds no
        kernel that is faster, it is `product` and `add_rms`.

    Returns:
      [T, B] in the type of x, and f32[T]. After a kernel the scale is XLA's to take, who leaves it
      out where nobody asks for it.

    Raises:
      ValueError: shapes, types or eps contradict the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    bind_dims(x=(x, "TB"), y=(y, "TA"), w=(w, "AB"))
    _check_types(x=x, y=y, w=w)
    check_eps(eps)
    if implementation is None and not _ADDING.module("mosaic_gpu").add_pays(y, w):
        return add_rms(x, product(y, w), eps=eps)
    total = _ADDING.choose(
        implementation,
        (x, y, w),
        bound=lambda name: _ADDING.module(name).add_product,
        refusal=lambda name: _ADDING.module(name).add_refusal(y, w),
    )
    return total, rms_scale(total, eps)


def norm_product(
    x: jax.Array,
    scale: jax.Array,
    w: jax.Array,
    *,
    eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A product of normed rows, for one who scales rows anyway: y and r, of which y * r is
    RMSNorm(x) @ w. A kernel that takes the scale itself returns ones, and nothing has to run
    before it.

    Args:
      x: [T, A].
      scale: f32[T], that of RMSNorm for x with `eps`.
      w: [A, B], of the type of x.
      eps: >= 0.
      implementation: as in `product`.

    Returns:
      [T, B] in the type of x, and f32[T].

    Raises:
      ValueError: shapes, types or eps contradict the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    bind_dims(x=(x, "TA"), scale=(scale, "T"), w=(w, "AB"))
    _check_types(x=x, w=w)
    check_float32(scale=scale)
    check_eps(eps)
    if implementation is None and not _NORMED.module("mosaic_gpu").norm_pays(x, w):
        return product(x, w), scale
    return _NORMED.choose(
        implementation,
        (x, scale, w),
        bound=lambda name: partial(_NORMED.module(name).norm_product, eps=eps),
        refusal=lambda name: _NORMED.module(name).norm_refusal(x, w),
    )


def _check_types(**operands: jax.Array) -> None:
    (first, x), *others = operands.items()
    check_floating(**{first: x})
    for name, other in others:
        if other.dtype != x.dtype:
            raise ValueError(f"{name} is {other.dtype}, but {first} is {x.dtype}")
