"""Shared parts of the operations' cases, in numpy: a naive attention, with which tests and `check`
compare every implementation, and random numbers for large arrays."""

from collections.abc import Callable

import numpy as np

_DRAWN = 1 << 16
"""Numbers drawn for a large array: as many as 16 random bits can choose from."""
_BLOCK = 1 << 18
"""Numbers chosen at a time: numpy spends 8 bytes on the index of each."""
_KEYS = 256
"""Keys multiplied at a time. BLAS splits larger products of a few queries over threads, which wait
for one another longer than they compute; on a busy machine they wait tens of times as long."""


def normal(
    rng: np.random.Generator, shape: tuple[int, ...], convert: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Draw normal numbers as float32, then convert them.

    Each number of a large array is chosen at random from 65,536 drawn ones. That is several times
    faster than drawing all, and tells pages apart, and right sums from wrong ones, just as well.
    """
    size = int(np.prod(shape))
    numbers = convert(rng.standard_normal(min(size, _DRAWN), np.float32))
    if size <= _DRAWN:
        return numbers.reshape(shape)
    out = np.empty(size, numbers.dtype)
    for start in range(0, size, _BLOCK):
        block = out[start : start + _BLOCK]
        which = rng.integers(_DRAWN, size=len(block), dtype=np.uint16)
        numbers.take(which, out=block, mode="clip")  # no index needs clipping; it avoids a copy
    return out.reshape(shape)


def naive_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    visible: np.ndarray,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
) -> np.ndarray:
    """Compute attention of one sequence's queries over its keys, float32[Q, N, H].

    Args:
      q: [Q, N, H].
      k, v: [C, K, H].
      visible: bool[Q, C]; every query sees a key.
      scale, logit_soft_cap: as in the operations.
    """
    q, k, v = (np.moveaxis(np.asarray(x, np.float32), 1, 0) for x in (q, k, v))
    grouped = q.reshape(len(k), -1, *q.shape[1:])  # [K, G, Q, H]
    out = np.empty_like(grouped)
    blocks = [slice(start, start + _KEYS) for start in range(0, k.shape[1], _KEYS)]
    for head, queries in enumerate(grouped):
        rows = queries.reshape(-1, queries.shape[-1])  # [G * Q, H]: all queries of a KV head
        scores = scale * np.concatenate([rows @ k[head, x].T for x in blocks], axis=1)
        if logit_soft_cap is not None:
            scores = logit_soft_cap * np.tanh(scores / logit_soft_cap)
        scores = np.where(visible, scores.reshape(*queries.shape[:2], -1), -np.inf)  # [G, Q, C]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        weights = weights.reshape(len(rows), -1)
        out[head] = sum(weights[:, x] @ v[head, x] for x in blocks).reshape(queries.shape)
    return np.moveaxis(out.reshape(q.shape), 0, 1)
