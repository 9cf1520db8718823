"""The requirements of a TPU's tiled memory on pages, shared by the TPU kernels."""

import jax

LANES = 128
_TILE_BYTES = 32  # bytes of a column of a tile: 8 rows of float32, 16 of bfloat16


def tile_rows(x: jax.Array) -> int:
    """Number of rows of a tile of x's type."""
    return _TILE_BYTES // x.dtype.itemsize


def page_bytes(pages: jax.Array) -> int:
    """Number of bytes of one page over all KV heads of `pages` [K, P, S, H]."""
    kv_heads, _, page_size, head_dim = pages.shape
    return kv_heads * page_size * head_dim * pages.dtype.itemsize


def pages_refusal(pages: jax.Array) -> str | None:
    """Say why a page [S, H] is not a whole number of tiles that can be copied, or return None."""
    page_size, head_dim = pages.shape[2:]
    rows = tile_rows(pages)
    if page_size % rows:
        return f"the page size of {pages.dtype} must be a multiple of {rows}, not {page_size}"
    if head_dim % (LANES // 2):
        return f"the head dim must be a multiple of {LANES // 2}, not {head_dim}"
    return None
