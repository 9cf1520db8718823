"""Prefill attention: packed chunks of several prompts, each over its own pages.

The input is ragged, as in FlashAttention's variable-length interface and in FlashInfer (Ye et al.,
2025): lengths are cumulative, and the pages of all sequences are one flat list, so a batch is
padded once and not once a sequence.
"""

import jax

from pallas_kernels.dims import bind_dims, check_attention, check_int32
from pallas_kernels.implementations import Operation
from pallas_kernels.quantised import check_pages

PLATFORMS = {
    "reference": ("cpu", "gpu", "tpu"),
    "mosaic_tpu": ("tpu",),
    "mosaic_gpu": ("gpu",),
}
"""Platforms where each implementation runs compiled; interpreted, all run on the CPU."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# The implementation that `None` lowers to on each platform, if it takes the arguments. A kernel is
# listed once `python -m pallas_kernels.check` has passed on that hardware.
_PROVEN: dict[str, str] = {"cuda": "mosaic_gpu"}

_OPERATION = Operation(
    "prefill_attention", "pallas_kernels.prefill_attention", IMPLEMENTATIONS, _PROVEN, warns=True
)


def prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    kv_pages: jax.Array,
    cu_pages: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return causal softmax(scale * q k^T) v of every token over its own sequence's pages.

    The pages already hold the K and V of the chunk itself. Products and sums are in float32. Memory
    that no token sees may hold anything, NaN included, and so may the pages of other sequences.
    Within a sequence, where a token sees earlier tokens and not later ones, pages obey
    `pallas_kernels.finite`: V is finite, and NaN in K marks a token that is not. A token's result
    depends only on tokens that it sees; it is not finite if their K holds NaN. Within
    `jax.shard_map`, heads may be split; the map must be made with `check_vma=False`.

    Args:
      q: [T, N, H], the chunks of B sequences one after another; the rest is padding.
      k_pages, v_pages: [K, P, S, H]; query head n reads KV head n // (N / K).
      kv_pages: i32[Z], the pages of all sequences one after another; the rest is padding. Every
        entry is a valid page.
      cu_pages: i32[B + 1]; the pages of sequence b are kv_pages[cu_pages[b] : cu_pages[b + 1]].
      cu_q_lens: i32[B + 1]; sequence b has tokens cu_q_lens[b] to cu_q_lens[b + 1] - 1 of q. It has
        none where the two are equal, as for sequences that pad the batch.
      kv_lens: i32[B], tokens of each sequence in its pages, the chunk included: the chunk's last
        token has position kv_lens[b] - 1.
      scale: > 0, multiplies the scores.
      logit_soft_cap: if given, scores become cap * tanh(score / cap).
      sliding_window: if given, a token sees itself and the sliding_window - 1 before it.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, or the reference where no kernel takes these arguments.

    Returns:
      [T, N, H] in q's dtype; zeros for padding.

    Raises:
      ValueError: shapes, types or options differ from the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    sizes = bind_dims(
        q=(q, "TNH"),
        k_pages=(k_pages, "KPSH"),
        v_pages=(v_pages, "KPSH"),
        kv_pages=(kv_pages, "Z"),
        kv_lens=(kv_lens, "B"),
    )
    for name, array in (("cu_pages", cu_pages), ("cu_q_lens", cu_q_lens)):
        if array.shape != (sizes["B"] + 1,):
            raise ValueError(
                f"{name} must be [B + 1] = [{sizes['B'] + 1}], but its shape is {array.shape}"
            )
    check_int32(kv_pages=kv_pages, cu_pages=cu_pages, cu_q_lens=cu_q_lens, kv_lens=kv_lens)
    check_pages(k_pages, v_pages)
    check_attention(sizes, q, scale, logit_soft_cap, sliding_window)
    operands = (q, k_pages, v_pages, kv_pages, cu_pages, cu_q_lens, kv_lens)
    options = {
        "scale": scale,
        "logit_soft_cap": logit_soft_cap,
        "sliding_window": sliding_window,
    }
    return _OPERATION.run(implementation, operands, options, shown=(q, k_pages, kv_pages))
