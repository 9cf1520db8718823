"""The first half of the MLP: gate and up out of one product, and the SwiGLU of them.

RMSNorm's scalar of a token commutes with the product, so that it is applied after it and the norm
needs no pass of its own.
"""

import jax

from pallas_kernels.dims import bind_dims, check_eps, check_float32, check_floating
from pallas_kernels.implementations import Operation

PLATFORMS = {"reference": ("cpu", "gpu", "tpu"), "mosaic_gpu": ("gpu",)}
"""Where each implementation runs compiled; interpreted they all run on the CPU. For TPUs there is
no kernel: what XLA makes of the reference there has not been looked at."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# What `implementation=None` lowers to on each platform, where it takes the arguments. A kernel
# enters when `python -m pallas_kernels.check` has passed on that hardware.
_PROVEN: dict[str, str] = {"cuda": "mosaic_gpu"}

_OPERATION = Operation("swiglu", "pallas_kernels.swiglu", IMPLEMENTATIONS, _PROVEN)


def swiglu(
    x: jax.Array,
    scale: jax.Array,
    w_gate_up: jax.Array,
    *,
    eps: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """silu(gate) * up, where [gate, up] = scale * (x @ w_gate_up) for each token.

    Sums are taken in float32. Whether gate and up are rounded to the type of x before the SwiGLU,
    which is taken in float32, is left open. Within `jax.shard_map`, F may be split; the map must be
    made with `check_vma=False`.

    Args:
      x: [T, D].
      scale: f32[T].
      w_gate_up: [D, 2, F], gate first, of the type of x.
      eps: where `scale` is that of RMSNorm for x with this eps, >= 0, and nothing else asks for
        it: a kernel that has x at hand anyway takes it anew, and nothing has to run before it.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, which is the reference where no kernel takes these arguments or
        XLA's product is as fast.

    Returns:
      [T, F] in the type of x.

    Raises:
      ValueError: shapes, types or eps contradict the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    bind_dims(x=(x, "TD"), scale=(scale, "T"), w_gate_up=(w_gate_up, "DUF"))
    if w_gate_up.shape[1] != 2:
        raise ValueError(f"w_gate_up must be [D, 2, F], but its shape is {w_gate_up.shape}")
    check_float32(scale=scale)
    check_floating(x=x)
    if w_gate_up.dtype != x.dtype:
        raise ValueError(f"w_gate_up is {w_gate_up.dtype}, but x is {x.dtype}")
    if eps is not None:
        check_eps(eps)
    kernel = _OPERATION.module("mosaic_gpu")
    if implementation is None and not kernel.pays(x, w_gate_up, normed=eps is not None):
        implementation = "reference"
    operands = (x, scale, w_gate_up)
    return _OPERATION.run(implementation, operands, {"eps": eps}, shown=(x, w_gate_up))
