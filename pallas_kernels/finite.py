"""What pages hold of a token whose K or V is not finite.

V in pages is finite, always. A token of which K or V is NaN or infinite, or becomes infinite in the
pages' type, has NaN in its K. So whoever attends to that token gets a score of NaN, and with it a
result that is not finite. For everybody else the score is replaced, as are those of all tokens that
a query does not see, and the weight of 0 that it leads to silences any finite V. A NaN in V would
not be silenced: 0 * NaN is NaN.

Where K and V are written this costs a comparison of each number; where they are read, nothing.
"""

import math

import jax
import jax.numpy as jnp


def finite_below(dtype: jax.typing.DTypeLike) -> float:
    """The bound of the magnitudes of float32 numbers that are finite as numbers of a floating type.

    A comparison with it holds before numbers are rounded. A test of what was rounded might not: XLA
    may leave out to round a number that is made float32 again.
    """
    info = jnp.finfo(dtype)
    if info.bits >= 32:
        return math.inf
    largest = float(info.max)
    # Halfway to what would come next.
    return largest + 2.0 ** (math.frexp(largest)[1] - info.nmant - 2)


def guarded(k: jax.Array, v: jax.Array, below: float) -> tuple[jax.Array, jax.Array]:
    """K and V as pages hold them: V with 0, and K with NaN, where either is not finite.

    Args:
      k, v: float32, of one shape, before they are rounded.
      below: `finite_below` of the pages' type.
    """
    is_finite = jnp.abs(v) < below
    return guarded_k(k, v, below), jnp.where(is_finite, v, jnp.zeros_like(v))


def guarded_k(k: jax.Array, v: jax.Array, below: float) -> jax.Array:
    """The K of `guarded`."""
    is_finite = (jnp.abs(k) < below) & (jnp.abs(v) < below)
    return jnp.where(is_finite, k, jnp.full_like(k, jnp.nan))
