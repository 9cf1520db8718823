"""Specification of swiglu, and the implementation that runs where no kernel pays."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def swiglu(
    x: jax.Array,
    scale: jax.Array,
    w_gate_up: jax.Array,
    *,
    eps: float | None = None,
    activation: str = "silu",
) -> jax.Array:
    """See `pallas_kernels.swiglu.api.swiglu`; arguments are already checked."""
    del eps  # `scale` is given
    model_dim, _, mlp_dim = w_gate_up.shape
    # Accelerators would otherwise round float32 operands.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    gate_up = lax.dot(x, w_gate_up.reshape(model_dim, 2 * mlp_dim), precision=precision)
    scaled = gate_up.astype(jnp.float32) * scale[:, None]
    act = jax.nn.silu if activation == "silu" else partial(jax.nn.gelu, approximate=True)
    hidden = act(scaled[:, :mlp_dim]) * scaled[:, mlp_dim:]
    return hidden.astype(x.dtype)
