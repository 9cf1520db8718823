"""Pages of 8-bit numbers, with a scale for each token and KV head; K and V have their own.

    scale = largest magnitude / limit        element = round(x / scale)        x' = element * scale

so that |x - x'| is at most half a scale (int8), or the larger of |x| / 16 and scale / 1024
(float8_e4m3fn), and x' == x wherever x / scale is such an element. A token and head of zeros stays
zeros. One with a largest magnitude too small for its scale to be a normal float32 (below about
1e-35) becomes zeros. One with a NaN or an infinity becomes NaNs throughout.

KIVI (Liu et al., 2024) also uses a scale a token for V. Its K, and that of KVQuant (Hooper et al.,
2024), has a scale a channel over several tokens, which must all be there before the first is
rounded. A token that is rounded alone becomes the same numbers at any time and in any page.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dims import check_float32, check_floating

LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Types to round to, and the largest number of each."""


class QuantisedPages(NamedTuple):
    """K or V of a layer, read by `decode`; or a tree of the same structure, such as their
    shardings."""

    elements: Any  # [K, P, S, H], of a type in LIMITS
    scales: Any  # f32[K, P, S]


Pages = jax.Array | QuantisedPages
"""K or V of a layer, [K, P, S, H]."""


def encode(x: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Round x [..., H] to elements [..., H] with scales f32[...]."""
    limit = LIMITS[dtype]
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / limit
    scaled = jnp.clip(x / jnp.where(scale > 0, scale, 1), -limit, limit)
    return (jnp.round(scaled) if dtype == "int8" else scaled).astype(dtype), scale[..., 0]


def decode(elements: jax.Array, scales: jax.Array) -> jax.Array:
    """Return elements * scales, the inverse of `encode`, in float32."""
    return elements.astype(jnp.float32) * scales[..., None]


def elements_of(pages: Pages) -> jax.Array:
    """Return the array [K, P, S, H] that has the shape and the type of the pages."""
    return pages.elements if isinstance(pages, QuantisedPages) else pages


def dims_of(**named: Pages) -> dict[str, tuple[jax.Array, str]]:
    """Describe pages, by argument name, for `dims.bind_dims`."""
    dims = {name: (elements_of(pages), "KPSH") for name, pages in named.items()}
    scaled = {name: pages for name, pages in named.items() if isinstance(pages, QuantisedPages)}
    return dims | {f"{name}.scales": (pages.scales, "KPS") for name, pages in scaled.items()}


def check_pages(k_pages: Pages, v_pages: Pages) -> None:
    """Raise ValueError unless both have the same type: floating, or of LIMITS with scales."""
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if isinstance(pages, QuantisedPages):
            if pages.elements.dtype.name not in LIMITS:
                raise ValueError(
                    f"{name}.elements must be one of {', '.join(LIMITS)}, "
                    f"but they are {pages.elements.dtype}"
                )
            check_float32(**{f"{name}.scales": pages.scales})
        else:
            check_floating(**{name: pages})
    kinds = [_kind(pages) for pages in (k_pages, v_pages)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"v_pages is {kinds[1]}, but k_pages is {kinds[0]}")


def _kind(pages: Pages) -> str:
    scaled = " with scales" if isinstance(pages, QuantisedPages) else ""
    return f"{elements_of(pages).dtype}{scaled}"
