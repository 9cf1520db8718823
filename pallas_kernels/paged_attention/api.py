"""Decode attention: one query token a row over the row's pages, also with the write of its KV.

Pages are those of vLLM's PagedAttention (Kwon et al., 2023), with the KV head outermost, so that a
(head, page) pair is one contiguous tile for a kernel to copy.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.dims import bind_dims, check_attention, check_int32
from pallas_kernels.implementations import Operation
from pallas_kernels.kv_write.api import rope_and_write
from pallas_kernels.quantised import Pages, check_pages, dims_of, elements_of

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

_ATTEND, _APPEND = (
    Operation(name, "pallas_kernels.paged_attention", IMPLEMENTATIONS, _PROVEN, warns=True)
    for name in ("paged_attention", "append_attention")
)


def paged_attention(
    q: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return softmax(scale * q k^T) v of every row over the first `kv_lens` tokens of its pages.

    Products and sums are in float32. Memory that no row reads, past `kv_lens` in a page or in pages
    that no table names, may hold anything, NaN included. A row's result depends only on its own
    tokens; it is not finite where K or V of any of them is not. Within `jax.shard_map`, heads may
    be split; the map must be made with `check_vma=False`.

    Args:
      q: [B, N, H], the query of each row's newest token; the pages already hold its K and V.
      k_pages, v_pages: [K, P, S, H], or QuantisedPages, which are read through `quantised.decode`;
        query head n reads KV head n // (N / K).
      page_table: i32[B, W]; entry w is the page of tokens w * S to w * S + S - 1 of the row. Every
        entry is a valid page, even those beyond `kv_lens`.
      kv_lens: i32[B], 0 to W * S; 0 is an empty row, with zeros as its output.
      scale: > 0, multiplies the scores.
      logit_soft_cap: if given, scores become cap * tanh(score / cap).
      sliding_window: if given, a row sees only this many of its newest tokens.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, or the reference where no kernel takes these arguments.

    Returns:
      [B, N, H] in q's dtype.

    Raises:
      ValueError: shapes, types or options differ from the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    sizes = bind_dims(
        q=(q, "BNH"),
        **dims_of(k_pages=k_pages, v_pages=v_pages),
        page_table=(page_table, "BW"),
        kv_lens=(kv_lens, "B"),
    )
    check_int32(page_table=page_table, kv_lens=kv_lens)
    check_pages(k_pages, v_pages)
    check_attention(sizes, q, scale, logit_soft_cap, sliding_window)
    options = {
        "scale": scale,
        "logit_soft_cap": logit_soft_cap,
        "sliding_window": sliding_window,
    }
    operands = (q, k_pages, v_pages, page_table, kv_lens)
    return _ATTEND.run(
        implementation, operands, options, shown=(q, elements_of(k_pages), page_table)
    )


def append_attention(
    qkv: jax.Array,
    row_scale: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Pages, Pages]:
    """Do all of decode's attention: write each row's newest token, at position `kv_lens - 1`, with
    `rope_and_write`, and attend to the row with `paged_attention`.

    Where K or V of that token is not finite, the row's result is not finite, and pages store the
    token as `pallas_kernels.finite` says.

    Args:
      qkv: [B, K, G + 2, H]; each KV head has its G query heads, then K, then V, as the projection
        returns them.
      row_scale: f32[B], multiplies the rows of qkv. A NaN of one head may spread to the heads of
        its KV head, and to no other.
      bias: [K, G + 2, H], added after the scale, or None.
      cos, sin: f32[B, H/2], of each row's angles; rows of qkv are rotated as in `rope_and_write`.
      k_pages, v_pages: [K, P, S, H], or QuantisedPages, updated in place if they are donated. The
        query attends to the numbers that are written: in QuantisedPages, to the rounded newest
        token.
      page_table: i32[B, W]; see `paged_attention`. The pages of the newest tokens all differ,
        except those of empty rows.
      kv_lens: i32[B], 0 to W * S, the newest token included; 0 is an empty row, with zeros as its
        output, which may write to page 0, the null page.
      scale, logit_soft_cap, sliding_window: see `paged_attention`.
      implementation: one of IMPLEMENTATIONS, or None; see `paged_attention`.

    Returns:
      [B, N, H] in qkv's dtype; k_pages and v_pages. The contents of the null page are unspecified.

    Raises:
      ValueError, NotImplementedError: see `paged_attention`.
    """
    sizes = bind_dims(
        qkv=(qkv, "BKJH"),
        **dims_of(k_pages=k_pages, v_pages=v_pages),
        page_table=(page_table, "BW"),
        kv_lens=(kv_lens, "B"),
    )
    check_int32(page_table=page_table, kv_lens=kv_lens)
    token = (qkv, row_scale, bias, cos, sin)
    # This checks the other arguments: kv_lens has the shape and type of a slot mapping.
    write = partial(rope_and_write, implementation="reference")
    q, _, _ = jax.eval_shape(write, *token, k_pages, v_pages, kv_lens)
    sizes["N"] = q.shape[1]
    check_attention(sizes, q, scale, logit_soft_cap, sliding_window)
    options = {
        "scale": scale,
        "logit_soft_cap": logit_soft_cap,
        "sliding_window": sliding_window,
    }

    def bound(name: str) -> Callable[..., tuple[jax.Array, Pages, Pages]]:
        if name in _FUSED:
            return partial(_APPEND.module(name).append_attention, **options)
        write = "reference" if name == "reference" else None
        return partial(
            _write_then_attend, write, partial(_APPEND.module(name).paged_attention, **options)
        )

    def refusal(name: str) -> str | None:
        if name in _FUSED:
            return _APPEND.module(name).append_refusal(qkv, elements_of(k_pages), page_table)
        return _APPEND.module(name).refusal(q, elements_of(k_pages), page_table)

    operands = (*token, k_pages, v_pages, page_table, kv_lens)
    return _APPEND.choose(implementation, operands, bound=bound, refusal=refusal)


# Implementations of `append_attention` that are one kernel; the others write, then attend.
_FUSED = ("mosaic_gpu",)


def _write_then_attend(
    write: str | None,
    attend: Callable[..., jax.Array],
    qkv: jax.Array,
    row_scale: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    page_table: jax.Array,
    kv_lens: jax.Array,
) -> tuple[jax.Array, Pages, Pages]:
    """Run append_attention as two operations: `write` names the implementation of the first,
    `attend` is the second."""
    slots = _newest_slots(page_table, kv_lens, page_size=elements_of(k_pages).shape[2])
    q, k_pages, v_pages = rope_and_write(
        qkv, row_scale, bias, cos, sin, k_pages, v_pages, slots, implementation=write
    )
    return attend(q, k_pages, v_pages, page_table, kv_lens), k_pages, v_pages


def _newest_slots(page_table: jax.Array, kv_lens: jax.Array, *, page_size: int) -> jax.Array:
    """Return i32[B], the flat addresses page * S + offset of the rows' newest tokens; those of
    empty rows are in the null page."""
    newest = jnp.maximum(kv_lens - 1, 0)
    page = jnp.take_along_axis(page_table, newest[:, None] // page_size, axis=1)[:, 0]
    return jnp.where(kv_lens > 0, page * page_size + newest % page_size, 0)
