"""A pool of pages in host memory."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from pdjax.interfaces.transport import Pool


class HostPool:
    """Pages in memory of the host that is reserved at once and given by the system page by page, as
    it is first written: so a large pool is ready as soon as a small one.

    A page is one run of bytes over all layers, planes and heads, so that it is one piece to
    whatever stores it.

    Args:
      pool: its name, and a layout on one device that is not quantised.

    Attributes:
      rows: u8[P, bytes of a page].
      planes: of each layer, of each of its planes, a view of them [P, K, S, H].

    Raises:
      ValueError: a layout over several devices, or of quantised pages.
    """

    def __init__(self, pool: Pool) -> None:
        layout = pool.layout
        if layout.stages * layout.tp > 1 or layout.quantised:
            raise ValueError(
                f"{pool.id}: stages={layout.stages}, tp={layout.tp}, dtype={layout.dtype}: a pool "
                "in host memory must be whole, and of a type without scales"
            )
        self.id, self.layout, self.num_pages = pool.id, layout, pool.num_pages
        self.rows = np.zeros((pool.num_pages, layout.page_bytes), np.uint8)
        self.planes = list(self._views())

    def _views(self) -> Iterator[list[np.ndarray]]:
        layout, before = self.layout, 0
        dtype: Any = jnp.dtype(layout.dtype)
        row, head = layout.page_bytes, layout.page_size * layout.itemsize
        for planes in layout.planes:
            views: list[np.ndarray] = []
            for plane in planes:
                shape = self.num_pages, plane.heads, layout.page_size, plane.dim
                strides = row, head * plane.dim, plane.dim * layout.itemsize, layout.itemsize
                views.append(np.ndarray(shape, dtype, self.rows, before, strides))
                before += plane.heads * head * plane.dim
            yield views

    def read(self, layer: int, plane: int, heads: slice, pages: np.ndarray) -> np.ndarray:
        """Some heads of pages i32[n], [heads, n, S, H]; a copy."""
        return self.planes[layer][plane][pages, heads].swapaxes(0, 1)

    def write(
        self, layer: int, plane: int, heads: slice, pages: np.ndarray, content: np.ndarray
    ) -> None:
        """Write [heads, n, S, H] to some heads of pages i32[n]."""
        self.planes[layer][plane][pages, heads] = content.swapaxes(0, 1)

    def close(self) -> None:
        """Let go of the memory; the pool has no pages from now on."""
        self.rows, self.planes = np.zeros((0, 0), np.uint8), []
