"""How pages store a token with a K or V that is not finite.

V in pages is always finite. If a token's K or V is NaN or infinite, or becomes infinite in the
pages' type, its K in the pages is NaN. A query that sees the token gets a score of NaN and so a
result that is not finite. For any other query the score is masked, like those of all tokens that
the query does not see, and the resulting weight of 0 removes any finite V. It would not remove a
NaN in V: 0 * NaN is NaN.

A write compares each number of K and V with a bound; a read does nothing more.
"""

import math

import jax
import jax.numpy as jnp


def finite_below(dtype: jax.typing.DTypeLike) -> float:
    """Return the bound below which float32 magnitudes stay finite when rounded to a floating type.

    Compare with it before the numbers are rounded. A test of rounded numbers could fail: XLA may
    skip the rounding of a number that becomes float32 again.
    """
    info = jnp.finfo(dtype)
    if info.bits >= 32:
        return math.inf
    largest = float(info.max)
    # Halfway to the number that would follow the largest.
    return largest + 2.0 ** (math.frexp(largest)[1] - info.nmant - 2)


def guarded(k: jax.Array, v: jax.Array, below: float) -> tuple[jax.Array, jax.Array]:
    """Return K and V as pages store them: where either is not finite, V is 0 and K is NaN.

    Args:
      k, v: float32, of one shape, before they are rounded.
      below: `finite_below` of the pages' type.
    """
    is_finite = jnp.abs(v) < below
    return guarded_k(k, v, below), jnp.where(is_finite, v, jnp.zeros_like(v))


def guarded_k(k: jax.Array, v: jax.Array, below: float) -> jax.Array:
    """Return the K of `guarded`."""
    is_finite = (jnp.abs(k) < below) & (jnp.abs(v) < below)
    return jnp.where(is_finite, k, jnp.full_like(k, jnp.nan))
