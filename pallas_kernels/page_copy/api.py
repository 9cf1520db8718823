"""Gathers pages of many pools into one array, and scatters them back: the two ends of a transfer.

Memory bandwidth bounds both: a page of a head is one run of S * H numbers and is copied whole.
"""

from collections.abc import Sequence

import jax

from pallas_kernels.dims import bind_dims, check_int32
from pallas_kernels.implementations import Operation

PLATFORMS = {"reference": ("cpu", "gpu", "tpu"), "mosaic_gpu": ("gpu",)}
"""Platforms where each implementation of gather runs compiled; interpreted, all run on the CPU."""

SCATTER_PLATFORMS = {"reference": PLATFORMS["reference"]}
"""Platforms of scatter's implementation: on an H100 XLA's was as fast as a kernel of copies."""

IMPLEMENTATIONS = tuple(PLATFORMS)

# The implementation that `None` lowers to on each platform, if it takes the arguments. A kernel is
# listed once `python -m pallas_kernels.check` has passed on that hardware.
_PROVEN: dict[str, str] = {"cuda": "mosaic_gpu"}

_FOLDER = "pallas_kernels.page_copy"
_GATHER = Operation("gather", _FOLDER, IMPLEMENTATIONS, _PROVEN)
_SCATTER = Operation("scatter", _FOLDER, tuple(SCATTER_PLATFORMS), {})


def gather(
    arrays: Sequence[jax.Array],
    page_ids: jax.Array,
    *,
    heads: slice = slice(None),
    implementation: str | None = None,
) -> jax.Array:
    """Copy the listed pages of some heads of every pool into one array.

    Args:
      arrays: A pools [K, P, S, H], at least one, all of one shape and type.
      page_ids: i32[Z], all valid.
      heads: K' adjacent heads of the K heads.
      implementation: one of IMPLEMENTATIONS, or None for the one proven on the platform that the
        program is lowered for, or the reference where no kernel takes these arguments.

    Returns:
      [A * K', Z, S, H], with the heads of a pool side by side.

    Raises:
      ValueError: shapes, types or heads differ from the above, or no such implementation.
      NotImplementedError: the named implementation does not take these arguments.
    """
    _check(arrays, page_ids)
    start, stop, step = heads.indices(arrays[0].shape[0])
    if step != 1 or start >= stop:
        raise ValueError(f"heads must be one or more in a row, but they are {heads}")
    options = {"heads": slice(start, stop)}
    operands = tuple(arrays), page_ids
    return _GATHER.run(implementation, operands, options, shown=(arrays[0],))


def scatter(
    arrays: Sequence[jax.Array],
    pages: jax.Array,
    page_ids: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """Replace the listed pages of the pools, all heads: the inverse of `gather`.

    The pools are updated in place if they are donated; no other memory of theirs changes.

    Args:
      arrays: A pools [K, P, S, H], at least one, all of one shape and type.
      pages: [A * K, Z, S, H], of the pools' type.
      page_ids: i32[Z], all valid. Several may be 0, the null page; all others differ.
      implementation: "reference", or None for the same.

    Returns:
      The pools. The contents of their null pages are unspecified.

    Raises:
      ValueError: shapes or types differ from the above, or no such implementation.
    """
    _check(arrays, page_ids)
    pool = arrays[0]
    needed = (len(arrays) * pool.shape[0], *page_ids.shape, *pool.shape[2:])
    if pages.shape != needed or pages.dtype != pool.dtype:
        raise ValueError(
            f"pages must be [A * K, Z, S, H] = {pool.dtype}{list(needed)}, "
            f"but they are {pages.dtype}{list(pages.shape)}"
        )
    return _SCATTER.run(implementation, (tuple(arrays), pages, page_ids), {}, shown=(pool,))


def _check(arrays: Sequence[jax.Array], page_ids: jax.Array) -> None:
    if not arrays:
        raise ValueError("arrays must not be empty")
    named = {f"arrays[{i}]": (array, "KPSH") for i, array in enumerate(arrays)}
    bind_dims(**named, page_ids=(page_ids, "Z"))
    check_int32(page_ids=page_ids)
    for i, array in enumerate(arrays):
        if array.dtype != arrays[0].dtype:
            raise ValueError(f"arrays[{i}] is {array.dtype}, but arrays[0] is {arrays[0].dtype}")
