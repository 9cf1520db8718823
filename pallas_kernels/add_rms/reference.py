"""Specification of add_rms, and its implementation on the CPU."""

import jax
import jax.numpy as jnp
from jax import lax


def add_rms(x: jax.Array, y: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.add_rms.api.add_rms`; arguments are already checked."""
    total = x + y
    return total, rms_scale(total, eps)


def rms_scale(x: jax.Array, eps: float) -> jax.Array:
    """Return f32[T], which scales x [T, D] to unit root mean square."""
    return lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1) + eps)
