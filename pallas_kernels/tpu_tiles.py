"""What a TPU's tiled memory asks of pages; its kernels share this."""

import jax

LANES = 128
_TILE_BYTES = 32  # of a column of a tile: 8 rows of float32, 16 of bfloat16


def tile_rows(x: jax.Array) -> int:
    """Rows of a tile of x's type."""
    return _TILE_BYTES // x.dtype.itemsize


def page_bytes(pages: jax.Array) -> int:
    """Bytes of one page of all KV heads of `pages` [K, P, S, H]."""
    kv_heads, _, page_size, head_dim = pages.shape
    return kv_heads * page_size * head_dim * pages.dtype.itemsize


def pages_refusal(pages: jax.Array) -> str | None:
    """Why a page [S, H] is no whole number of tiles that can be copied, or None."""
    page_size, head_dim = pages.shape[2:]
    rows = tile_rows(pages)
    if page_size % rows:
        return f"the page size of {pages.dtype} must be a multiple of {rows}, not {page_size}"
    if head_dim % (LANES // 2):
        return f"the head dim must be a multiple of {LANES // 2}, not {head_dim}"
    return None
