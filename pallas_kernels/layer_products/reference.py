"""Specification of layer_products, and what runs where no kernel does."""

import jax

from pallas_kernels.add_rms.api import add_rms
from pallas_kernels.product.api import product
from pallas_kernels.swiglu.api import swiglu


def layer_products(
    o: jax.Array,
    x: jax.Array,
    wo: jax.Array,
    w_gate_up: jax.Array,
    w_down: jax.Array,
    wqkv: jax.Array | None = None,
    *,
    eps: float,
    implementation: str | None = "reference",
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.layer_products.api.layer_products`; arguments are taken as checked.

    Args:
      implementation: of the operations that it is made of; None: of each what is best.
    """
    x, scale = add_rms(
        x, product(o, wo, implementation=implementation), eps=eps, implementation=implementation
    )
    hidden = swiglu(x, scale, w_gate_up, implementation=implementation)
    down = product(hidden, w_down, implementation=implementation)
    x, scale = add_rms(x, down, eps=eps, implementation=implementation)
    if wqkv is None:
        return x, scale
    return x, scale, product(x, wqkv, implementation=implementation)
