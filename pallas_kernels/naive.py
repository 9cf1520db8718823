"""What the cases of the operations share, in numpy: the plainest attention there is, to which tests
and `check` hold every implementation, and random numbers for large arrays."""

from collections.abc import Callable

import numpy as np

_DRAWN = 1 << 16
"""As many as 16 random bits choose from."""
_BLOCK = 1 << 18
"""Numbers chosen at a time: numpy spends 8 bytes on the index of each."""
_KEYS = 256
"""Keys multiplied at a time. BLAS spreads larger products of a few queries over threads, which wait
for one another longer than they compute, and on a busy machine tens of times as long."""


def normal(
    rng: np.random.Generator, shape: tuple[int, ...], convert: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Normal numbers, float32 as drawn, then converted.

    Of large arrays each is one of 65,536 drawn, chosen at random: several times faster than to draw
    all, and as good at telling one page from another, and a right sum from a wrong one.
    """
    size = int(np.prod(shape))
    numbers = convert(rng.standard_normal(min(size, _DRAWN), np.float32))
    if size <= _DRAWN:
        return numbers.reshape(shape)
    out = np.empty(size, numbers.dtype)
    for start in range(0, size, _BLOCK):
        block = out[start : start + _BLOCK]
        which = rng.integers(_DRAWN, size=len(block), dtype=np.uint16)
        numbers.take(which, out=block, mode="clip")  # clips nothing, but writes without a copy
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
    """float32[Q, N, H] of one sequence's queries over its keys.

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
        rows = queries.reshape(-1, queries.shape[-1])  # [G * Q, H]: all that read a KV head
        scores = scale * np.concatenate([rows @ k[head, x].T for x in blocks], axis=1)
        if logit_soft_cap is not None:
            scores = logit_soft_cap * np.tanh(scores / logit_soft_cap)
        scores = np.where(visible, scores.reshape(*queries.shape[:2], -1), -np.inf)  # [G, Q, C]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        weights = weights.reshape(len(rows), -1)
        out[head] = sum(weights[:, x] @ v[head, x] for x in blocks).reshape(queries.shape)
    return np.moveaxis(out.reshape(q.shape), 0, 1)
