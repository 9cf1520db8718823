"""Decode attention: one query token a row over that row's pages.

Pages are those of vLLM's PagedAttention (Kwon et al., 2023), with the KV head outermost, so that a
(head, page) pair is one contiguous tile for a kernel to copy.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType

import jax
from jax import lax

from pallas_kernels.dims import bind_dims, check_attention, check_int32

PLATFORMS = {
    "reference": ("cpu", "gpu", "tpu"),
    "mosaic_tpu": ("tpu",),
    "mosaic_gpu": ("gpu",),
}
"""Where each implementation runs compiled; interpreted they all run on the CPU."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# What `implementation=None` lowers to on each platform, where it takes the arguments. A kernel
# enters when `python -m pallas_kernels.check` has passed on that hardware.
_PROVEN: dict[str, str] = {}


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v of every row over the first `kv_lens` tokens of its pages.

    Products and sums are taken in float32. Memory that no row reads, past `kv_lens` in a page or in
    pages that no table names, may hold anything, NaN included. Within `jax.shard_map`, heads may be
    split; the map must be made with `check_vma=False`.

    Args:
      q: [B, N, H], the query of each row's newest token, whose K and V are in the pages already.
      k_pages, v_pages: [K, P, S, H]; query head n reads KV head n // (N / K).
      page_table: i32[B, W]; entry w is the page of tokens w * S to w * S + S - 1 of the row. Every
        entry is a valid page, also those beyond `kv_lens`.
      kv_lens: i32[B], 0 to W * S; 0 is an empty row, whose output is zeros.
      scale: > 0, multiplies the scores.
      logit_soft_cap: if given, scores become cap * tanh(score / cap).
      sliding_window: if given, a row sees only its newest so many tokens.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, which is the reference where no kernel takes these arguments.

    Returns:
      [B, N, H] in q's dtype.

    Raises:
      ValueError: shapes, types or options contradict the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    sizes = bind_dims(
        q=(q, "BNH"),
        k_pages=(k_pages, "KPSH"),
        v_pages=(v_pages, "KPSH"),
        page_table=(page_table, "BW"),
        kv_lens=(kv_lens, "B"),
    )
    check_int32(page_table=page_table, kv_lens=kv_lens)
    check_attention(sizes, q, k_pages, v_pages, scale, logit_soft_cap, sliding_window)
    operands = (q, k_pages, v_pages, page_table, kv_lens)
    options = {
        "scale": scale,
        "logit_soft_cap": logit_soft_cap,
        "sliding_window": sliding_window,
    }

    def run(name: str) -> Callable[..., jax.Array]:
        return partial(_module(name).paged_attention, **options)

    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, "
                f"not {implementation!r}"
            )
        if reason := _refusal(implementation, q, k_pages, page_table):
            raise NotImplementedError(f"paged_attention by {implementation}: {reason}")
        return run(implementation)(*operands)
    kernels = {
        platform: run(name)
        for platform, name in _PROVEN.items()
        if _refusal(name, q, k_pages, page_table) is None
    }
    if not kernels:
        return run("reference")(*operands)
    return lax.platform_dependent(*operands, default=run("reference"), **kernels)


def _module(name: str) -> ModuleType:
    """Imported at first use: a kernel's imports may cost seconds where it never runs."""
    return import_module(f"pallas_kernels.paged_attention.{name}")


def _refusal(name: str, q: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str | None:
    """Why an implementation does not take these arguments; the reference takes all."""
    return None if name == "reference" else _module(name).refusal(q, k_pages, page_table)
