"""RMSNorm where it has a pass of its own: over Q and K, and over what a layer adds.

The scalar of a token does not commute with what follows there, a rotation of single heads or a sum.

Dimension key: T tokens, K KV heads, G query heads of each, J = G + 2, H head dim.
"""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Return x [..., A], of unit root mean square along its last axis, times weight [A], in
    float32."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide * scale * weight.astype(jnp.float32)


def norm_heads(
    qkv: jax.Array, scale: jax.Array, q_weight: jax.Array, k_weight: jax.Array, eps: float
) -> jax.Array:
    """Return qkv [T, K, J, H] scaled by f32[T], with each head of Q and of K normed by itself; both
    weights are [H]."""
    wide = qkv.astype(jnp.float32) * scale[:, None, None, None]
    q = rms_norm(wide[:, :, :-2], q_weight, eps)
    k = rms_norm(wide[:, :, -2:-1], k_weight, eps)
    return jnp.concatenate([q, k, wide[:, :, -1:]], axis=2).astype(qkv.dtype)
