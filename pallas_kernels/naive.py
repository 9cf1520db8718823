"""The plainest attention there is, in numpy; tests and `check` hold every implementation to it."""

import numpy as np


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
    group = len(q) // len(k)
    out = np.empty_like(q)
    for head in range(len(q)):
        scores = scale * (q[head] @ k[head // group].T)  # [Q, C]
        if logit_soft_cap is not None:
            scores = logit_soft_cap * np.tanh(scores / logit_soft_cap)
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[head] = weights / weights.sum(axis=1, keepdims=True) @ v[head // group]
    return np.moveaxis(out, 0, 1)
