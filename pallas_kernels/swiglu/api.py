"""The first half of the MLP: gate and up from one product, and their SwiGLU or GeGLU (Shazeer,
2020).

RMSNorm's scalar of a token commutes with the product, so it is applied after the product and the
norm needs no pass of its own.
"""

from functools import partial

import jax

from pallas_kernels.dims import bind_dims, check_eps, check_float32, check_floating
from pallas_kernels.implementations import Operation

PLATFORMS = {"reference": ("cpu", "gpu", "tpu"), "mosaic_gpu": ("gpu",)}
"""Platforms where each implementation runs compiled; interpreted, all run on the CPU. TPUs have no
kernel, and the reference has not been profiled there."""

IMPLEMENTATIONS = tuple(PLATFORMS)

ACTIVATIONS = ("silu", "gelu_tanh")

# The implementation that `None` lowers to on each platform, if it takes the arguments. A kernel is
# listed once `python -m pallas_kernels.check` has passed on that hardware.
_PROVEN: dict[str, str] = {"cuda": "mosaic_gpu"}

_OPERATION = Operation("swiglu", "pallas_kernels.swiglu", IMPLEMENTATIONS, _PROVEN)


def swiglu(
    x: jax.Array,
    scale: jax.Array,
    w_gate_up: jax.Array,
    *,
    eps: float | None = None,
    activation: str = "silu",
    implementation: str | None = None,
) -> jax.Array:
    """Return activation(gate) * up, where [gate, up] = scale * (x @ w_gate_up) for each token.

    Sums and the SwiGLU are in float32. It is unspecified whether gate and up are rounded to the
    type of x before the SwiGLU. Within `jax.shard_map`, F may be split; the map must be made with
    `check_vma=False`.

    Args:
      x: [T, D].
      scale: f32[T].
      w_gate_up: [D, 2, F], gate first, of the type of x.
      eps: >= 0; given if `scale` is RMSNorm's scale of x with this eps and has no other use. A
        kernel that reads x anyway then computes the scale itself, and no operation must run before
        it.
      activation: "silu", or "gelu_tanh", gelu by its tanh approximation, which kernels do not take.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, or the reference where no kernel takes these arguments or XLA's
        product is as fast.

    Returns:
      [T, F] in the type of x.

    Raises:
      ValueError: shapes, types or eps differ from the above, or no such implementation.
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
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    operands = (x, scale, w_gate_up)
    if activation != "silu":
        return _OPERATION.choose(
            "reference" if implementation is None else implementation,
            operands,
            bound=lambda name: partial(
                _OPERATION.module(name).swiglu, eps=eps, activation=activation
            ),
            refusal=lambda name: f"the activation must be silu, not {activation}",
        )
    if implementation is None and not (
        _OPERATION.may_run("mosaic_gpu")
        and _OPERATION.module("mosaic_gpu").pays(x, w_gate_up, normed=eps is not None)
    ):
        implementation = "reference"
    return _OPERATION.run(implementation, operands, {"eps": eps}, shown=(x, w_gate_up))
