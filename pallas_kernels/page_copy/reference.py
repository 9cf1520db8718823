"""Specification of gather and scatter, and its implementation on the CPU."""

import jax
import jax.numpy as jnp


def gather(arrays: tuple[jax.Array, ...], page_ids: jax.Array, *, heads: slice) -> jax.Array:
    """See `pallas_kernels.page_copy.api.gather`; arguments are already checked."""
    _, pages, *page = arrays[0].shape
    rows = _rows(jnp.arange(heads.start, heads.stop), pages, page_ids)
    taken = [
        array.reshape(-1, *page).at[rows.reshape(-1)].get(mode="promise_in_bounds")
        for array in arrays
    ]
    return jnp.concatenate(taken).reshape(-1, len(page_ids), *page)


def scatter(
    arrays: tuple[jax.Array, ...], pages: jax.Array, page_ids: jax.Array
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.page_copy.api.scatter`; arguments are already checked.

    Null pages go to different rows beyond the pool and are dropped. So all rows differ, and XLA,
    told so, may write them in any order.
    """
    heads, count, *page = arrays[0].shape
    rows = _rows(jnp.arange(heads), count, page_ids)
    beyond = heads * count + jnp.arange(rows.size, dtype=jnp.int32).reshape(rows.shape)
    rows = jnp.where(page_ids == 0, beyond, rows).reshape(-1)
    news = pages.reshape(len(arrays), -1, *page)
    return tuple(
        array.reshape(-1, *page)
        .at[rows]
        .set(new, mode="drop", unique_indices=True)
        .reshape(array.shape)
        for array, new in zip(arrays, news, strict=True)
    )


def _rows(heads: jax.Array, pages: int, page_ids: jax.Array) -> jax.Array:
    """Return i32[K', Z]: the rows of the listed pages among the pages of all heads."""
    return heads.astype(jnp.int32)[:, None] * pages + page_ids
