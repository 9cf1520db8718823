"""Attention over one block of keys after another.

It carries the running maximum and sum of Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018), with the weighted values as in FlashAttention (Dao et al., 2022).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantised import Pages, QuantisedPages, decode

MASKED = -1e30
"""Score of a key that a query does not see; finite, so that differences of scores are finite."""

LOWEST = -1e29
"""Initial running maximum, far above MASKED: a query that has seen no key gives every masked key
the weight exp(MASKED - LOWEST) = 0, and ends with a sum of 0."""

# KV heads are a batch dimension of both products; keys are contracted in the second.
_SCORES = (((2,), (2,)), ((0,), (0,)))
_VALUES = (((2,), (1,)), ((0,), (0,)))


class Running(NamedTuple):
    """The state of R queries of each KV head over the keys seen so far, float32."""

    weighted: jax.Array  # [K, R, H], sum of exp(score - highest) * value
    highest: jax.Array  # [K, R, 1]
    total: jax.Array  # [K, R, 1], sum of exp(score - highest)


def nothing_seen(kv_heads: int, queries: int, head_dim: int) -> Running:
    """Return the state before the first block."""
    return Running(
        weighted=jnp.zeros((kv_heads, queries, head_dim), jnp.float32),
        highest=jnp.full((kv_heads, queries, 1), LOWEST, jnp.float32),
        total=jnp.zeros((kv_heads, queries, 1), jnp.float32),
    )


def see_block(
    seen: Running,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    logit_soft_cap: float | None,
) -> Running:
    """Return the state after C more keys.

    Args:
      seen: the state before.
      q: float32[K, R, H], scaled.
      k, v: float32[K, C, H]; k may hold anything at keys that no query sees, v must be finite.
      visible: bool, broadcastable to [K, R, C].
      logit_soft_cap: scores become cap * tanh(score / cap).
    """
    scores = lax.dot_general(q, k, _SCORES, precision=lax.Precision.HIGHEST)  # [K, R, C]
    if logit_soft_cap is not None:
        scores = logit_soft_cap * jnp.tanh(scores / logit_soft_cap)
    scores = jnp.where(visible, scores, MASKED)
    highest = jnp.maximum(seen.highest, scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    fade = jnp.exp(seen.highest - highest)
    values = lax.dot_general(weights, v, _VALUES, precision=lax.Precision.HIGHEST)  # [K, R, H]
    return Running(
        weighted=seen.weighted * fade + values,
        highest=highest,
        total=seen.total * fade + weights.sum(axis=-1, keepdims=True),
    )


def attention_of(seen: Running) -> jax.Array:
    """Return the attention, float32[K, R, H]; zeros for a query that saw no key."""
    return seen.weighted / jnp.where(seen.total > 0, seen.total, 1)


def gather_pages(pages: Pages, page_ids: jax.Array) -> jax.Array:
    """Read the listed pages i32[C / S] of a pool [K, P, S, H] as float32[K, C, H].

    The ids must be valid.
    """
    if not isinstance(pages, QuantisedPages):
        return _tokens(pages, page_ids).astype(jnp.float32)
    scales = _tokens(pages.scales[..., None], page_ids)
    return decode(_tokens(pages.elements, page_ids), scales[..., 0])


def _tokens(pages: jax.Array, page_ids: jax.Array) -> jax.Array:
    """Copy the listed pages to [K, C, H].

    A page is copied as one run of S * H numbers: three times as fast on the CPU as S runs of H.
    """
    kv_heads, count, page_size, head_dim = pages.shape
    flat = pages.reshape(kv_heads, count, page_size * head_dim)
    taken = flat.at[:, page_ids].get(mode="promise_in_bounds")
    return taken.reshape(kv_heads, -1, head_dim)
