"""The operation between a layer's projection and its attention: rotate q and k, write K and V.

It is one pass over q, k and v as a fused projection returns them. RMSNorm's scalar of a token
commutes with the projection, so it is applied here and the norm needs no pass of its own.
"""

import jax

from pallas_kernels.dims import bind_dims, check_float32, check_floating, check_int32
from pallas_kernels.implementations import Operation
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

_OPERATION = Operation("rope_and_write", "pallas_kernels.kv_write", IMPLEMENTATIONS, _PROVEN)


def rope_and_write(
    qkv: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    slot_mapping: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, Pages, Pages]:
    """Scale, shift and rotate q, k and v of every token, and write k and v to their pages.

    Computed in float32: x = scale * qkv + bias; then the halves (a, b) of H become
    (a * cos - b * sin, b * cos + a * sin) in q and k, not in v. The pools are updated in place if
    they are donated; no other memory of theirs changes. Within `jax.shard_map`, KV heads may be
    split; the map must be made with `check_vma=False`.

    Pages store K and V as `pallas_kernels.finite.guarded` gives them. Pages with scales guard a
    token and KV head as a whole: V is finite, and where K or V was not, K has NaN in it. A token
    changes no other token's numbers, whatever it holds.

    Args:
      qkv: [T, K, J, H] with J = G + 2; each KV head has its G query heads, then K, then V.
      scale: f32[T].
      bias: [K, J, H], or None.
      cos, sin: f32[T, H/2], of each token's angles.
      k_pages, v_pages: [K, P, S, H], or QuantisedPages, for which new K and V are rounded.
      slot_mapping: i32[T], flat addresses page * S + offset, all valid. Addresses in page 0, the
        null page, are for padding tokens and may repeat; all others differ.

    Returns:
      q [T, N, H] in qkv's dtype, where head n of N = K * G belongs to KV head n // G; k_pages and
      v_pages. The contents of the null page are unspecified.

    Raises:
      ValueError: shapes or types differ from the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    sizes = bind_dims(
        qkv=(qkv, "TKJH"),
        scale=(scale, "T"),
        **({} if bias is None else {"bias": (bias, "KJH")}),
        cos=(cos, "TI"),
        sin=(sin, "TI"),
        **dims_of(k_pages=k_pages, v_pages=v_pages),
        slot_mapping=(slot_mapping, "T"),
    )
    if sizes["J"] < 3:
        raise ValueError(f"qkv must have J = G + 2 of at least 3 rows, but J = {sizes['J']}")
    if 2 * sizes["I"] != sizes["H"]:
        raise ValueError(f"cos must have I = H/2, but H = {sizes['H']} and I = {sizes['I']}")
    check_int32(slot_mapping=slot_mapping)
    check_float32(scale=scale, cos=cos, sin=sin)
    check_floating(qkv=qkv, **({} if bias is None else {"bias": bias}))
    check_pages(k_pages, v_pages)
    operands = (qkv, scale, bias, cos, sin, k_pages, v_pages, slot_mapping)
    return _OPERATION.run(
        implementation, operands, {}, shown=(qkv, elements_of(k_pages), slot_mapping)
    )
