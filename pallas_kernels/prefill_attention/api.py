"""Prefill attention: packed chunks of several prompts, each over its own pages.

Ragged in the manner of FlashAttention's variable-length interface and of FlashInfer (Ye et al.,
2025): lengths are cumulative, and the pages of all sequences are one flat list, so that padding is
paid once a batch and not once a sequence.
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
"""Where each implementation runs compiled; interpreted they all run on the CPU."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# What `implementation=None` lowers to on each platform, where it takes the arguments. A kernel
# enters when `python -m pallas_kernels.check` has passed on that hardware.
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
    """Causal softmax(scale * q k^T) v of every token over its own sequence's pages.

    The K and V of the chunk itself are in the pages already. Products and sums are taken in
    float32. Memory that no token sees may hold anything, NaN included. So may the pages of another
    sequence. Within a sequence, where tokens see what is before them and not what is after, pages
    hold what `pallas_kernels.finite` says: V is finite, and NaN in K tells of a token that is not.
    No token's result depends on what it does not see; that of a token that sees NaN in K is not
    finite. Within `jax.shard_map`, heads may be split; the map must be made with
    `check_vma=False`.

    Args:
      q: [T, N, H], the chunks of B sequences one after another; the rest is padding.
      k_pages, v_pages: [K, P, S, H]; query head n reads KV head n // (N / K).
      kv_pages: i32[Z], the pages of all sequences one after another; the rest is padding. Every
        entry is a valid page.
      cu_pages: i32[B + 1]; the pages of sequence b are kv_pages[cu_pages[b] : cu_pages[b + 1]].
      cu_q_lens: i32[B + 1]; sequence b has tokens cu_q_lens[b] to cu_q_lens[b + 1] - 1 of q. Where
        the two are equal it has none, as sequences that pad the batch.
      kv_lens: i32[B], tokens of each sequence in its pages, the chunk included, so that the chunk's
        last token has position kv_lens[b] - 1.
      scale: > 0, multiplies the scores.
      logit_soft_cap: if given, scores become cap * tanh(score / cap).
      sliding_window: if given, a token sees itself and the sliding_window - 1 before it.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, which is the reference where no kernel takes these arguments.

    Returns:
      [T, N, H] in q's dtype; zeros for padding.

    Raises:
      ValueError: shapes, types or options contradict the above, or no such implementation.
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
