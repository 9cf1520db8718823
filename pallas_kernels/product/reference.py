"""Specification of product, and what runs wherever XLA's product is as fast as any."""

import jax
import jax.numpy as jnp
from jax import lax


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """See `pallas_kernels.product.api.product`; arguments are taken as checked."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot(x, w, precision=precision)
