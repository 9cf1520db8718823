"""What stands between the projection of a layer and its attention: rotate, and write K and V.

One pass over q, k and v as they leave one fused projection. RMSNorm's scalar of a token commutes
with the projection, so that it is applied here and the norm needs no pass of its own.
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
"""Where each implementation runs compiled; interpreted they all run on the CPU."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# What `implementation=None` lowers to on each platform, where it takes the arguments. A kernel
# enters when `python -m pallas_kernels.check` has passed on that hardware.
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
    """Scales, shifts and rotates q, k and v of every token, and writes k and v to their pages.

    Taken in float32: x = scale * qkv + bias; then of q and k, but not of v, the halves (a, b) of H
    become (a * cos - b * sin, b * cos + a * sin). The pools are updated in place if they are
    donated; no other memory of theirs changes. Within `jax.shard_map`, KV heads may be split; the
    map must be made with `check_vma=False`.

    What is written is `pallas_kernels.finite.guarded`, or where pages have scales says the same of
    a token and KV head as a whole: V is finite, and where K or V was not, K has NaN in it. A token
    changes no other token's numbers, whatever it holds.

    Args:
      qkv: [T, K, J, H] with J = G + 2; of each KV head the G query heads, then K, then V.
      scale: f32[T].
      bias: [K, J, H], or None.
      cos, sin: f32[T, H/2] of each token's angles.
      k_pages, v_pages: [K, P, S, H], or QuantisedPages, for which new K and V are rounded.
      slot_mapping: i32[T], flat addresses page * S + offset, all valid. Those of page 0, the null
        page, are for padding tokens, and several may be the same; all others differ.

    Returns:
      q [T, N, H] in qkv's dtype, where head n of N = K * G belongs to KV head n // G; k_pages and
      v_pages. What the null page then holds is left open.

    Raises:
      ValueError: shapes or types contradict the above, or no such implementation.
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
