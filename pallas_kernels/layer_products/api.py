"""Everything of a decoder layer but its attention: from one layer's attention to the next layer's.

Five products of matrices and what stands between them, as one operation: where tokens are few, each
kernel that ends lets memory wait for the next one to begin.
"""

import math

import jax

from pallas_kernels.dims import bind_dims, check_floating
from pallas_kernels.implementations import Operation
from pallas_kernels.layer_products.reference import layer_products as composed

PLATFORMS = {"reference": ("cpu", "gpu", "tpu"), "mosaic_gpu": ("gpu",)}
"""Where each implementation runs compiled; interpreted they all run on the CPU."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# What `implementation=None` lowers to on each platform, where it takes the arguments and pays. A
# kernel enters when `python -m pallas_kernels.check` has passed on that hardware.
_PROVEN: dict[str, str] = {"cuda": "mosaic_gpu"}

_OPERATION = Operation("layer_products", "pallas_kernels.layer_products", IMPLEMENTATIONS, _PROVEN)


def layer_products(
    o: jax.Array,
    x: jax.Array,
    wo: jax.Array,
    w_gate_up: jax.Array,
    w_down: jax.Array,
    wqkv: jax.Array | None = None,
    *,
    eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """What a layer does after its attention, and the product that the next layer begins with.

    In the words of this package's other operations: x, scale = add_rms(x, product(o, wo)); hidden =
    swiglu(x, scale, w_gate_up); x, scale = add_rms(x, product(hidden, w_down)); and product(x,
    wqkv), which is still to be scaled. Each is rounded as it is there.

    Args:
      o: [T, A], what attention read, A = N * H.
      x: [T, D], the residual stream.
      wo: [A, D].
      w_gate_up: [D, 2, F], gate first.
      w_down: [F, D].
      wqkv: [D, C], the next layer's; None: there is none.
      eps: of RMSNorm, >= 0.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, where it takes these arguments and is faster than those operations
        one by one, and else for them, each as is best there.

    Returns:
      [T, D], f32[T] and, if there is wqkv, [T, C]: the residual stream, its RMS scale, and the
      product with wqkv. All but the scale are of the type of x.

    Raises:
      ValueError: shapes, types or eps contradict the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    bind_dims(
        o=(o, "TA"),
        x=(x, "TD"),
        wo=(wo, "AD"),
        w_gate_up=(w_gate_up, "DUF"),
        w_down=(w_down, "FD"),
        **({} if wqkv is None else {"wqkv": (wqkv, "DC")}),
    )
    if w_gate_up.shape[1] != 2:
        raise ValueError(f"w_gate_up must be [D, 2, F], but its shape is {w_gate_up.shape}")
    check_floating(x=x)
    weights = {"wo": wo, "w_gate_up": w_gate_up, "w_down": w_down, "wqkv": wqkv}
    for name, array in {"o": o, **weights}.items():
        if array is not None and array.dtype != x.dtype:
            raise ValueError(f"{name} is {array.dtype}, but x is {x.dtype}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number >= 0, but it is {eps}")
    operands = (o, x, *(array for array in weights.values() if array is not None))
    if implementation is None and not _OPERATION.module("mosaic_gpu").pays(*operands):
        return composed(*operands, eps=eps, implementation=None)
    return _OPERATION.run(implementation, operands, {"eps": eps}, shown=operands)
