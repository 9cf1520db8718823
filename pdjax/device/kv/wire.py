"""The form of KV on its way between two pools: pure functions that the programs at both ends call.

Exact KV travels in the narrower of the two pools' types. Rounded KV travels as small elements with
one float32 scale a token and KV head, K and V apart, as `pallas_kernels.quantised` makes them. The
pages of a quantised pool have this form already: they are sent without rounding, and received
without being expanded.

Scales and checksums travel in the same piece as their elements, since every piece of a put costs
time. Such a piece is words u32[n]: elements, then scales, then checksums.

Dimension key: X heads of several layers, K and V, T tokens, H head dim.
"""

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantised import LIMITS, Pages, QuantisedPages, decode, encode
from pdjax.core.kv_layout import KVLayout
from pdjax.device.kv.checksums import checksums


@dataclass(frozen=True)
class Wire:
    """The form of KV between two pools.

    Attributes:
      dtype: of the elements that travel.
      target_dtype: of the target's pages.
    """

    dtype: str
    target_dtype: str

    @classmethod
    def between(cls, source: KVLayout, target: KVLayout, wire_dtype: str | None) -> "Wire":
        """Choose the form: rounded to `wire_dtype` or to the type of a quantised pool, else exact.

        Raises:
          ValueError: `wire_dtype` is no type that KV is rounded to, or not that of a quantised
            pool.
        """
        if wire_dtype is not None and wire_dtype not in LIMITS:
            raise ValueError(f"wire_dtype={wire_dtype!r}: allowed are None and {', '.join(LIMITS)}")
        rounded = [pool.dtype for pool in (target, source) if pool.quantised]
        if wire_dtype is not None and rounded and wire_dtype not in rounded:
            raise ValueError(
                f"wire_dtype={wire_dtype!r}: must be None or {rounded[0]!r}, the type of a pool "
                "whose pages travel with the scales that they have there"
            )
        narrower = source if source.itemsize <= target.itemsize else target
        dtype = [*rounded, wire_dtype or narrower.dtype][0]
        return cls(dtype, target.dtype)

    @property
    def rounded(self) -> bool:
        """Whether elements have a scale."""
        return self.dtype in LIMITS

    def head_bytes(self, head_dim: int) -> int:
        """Bytes of one token and KV head, K or V."""
        return head_dim * jnp.dtype(self.dtype).itemsize + 4 * self.rounded

    def token_bytes(self, layout: KVLayout) -> int:
        """Bytes of one token, all layers and heads."""
        planes = [plane for layer in layout.planes for plane in layer]
        return sum(plane.heads * self.head_bytes(plane.dim) for plane in planes)

    def write(self, pages: Pages, spans: int, *, checked: bool) -> jax.Array:
        """Pages [X, n, S, H] of some spans of tokens -> a piece: [X, n, S, H], or words."""
        elements, *scales = self._encoded(pages)
        if not scales and not checked:
            return elements
        heads, pages_, page_size, _ = elements.shape
        arrays = [x.reshape(heads, pages_ * page_size, -1) for x in (elements, *scales)]
        words = [_words(array) for array in arrays]
        return jnp.concatenate([*words, checksums(arrays, spans)] if checked else words)

    def _encoded(self, pages: Pages) -> tuple[jax.Array, ...]:
        """Elements in the wire's type, and their scales if they are rounded."""
        if isinstance(pages, QuantisedPages):
            if pages.elements.dtype == self.dtype:
                return tuple(pages)
            pages = decode(*pages)
        return encode(pages, self.dtype) if self.rounded else (_cast(pages, self.dtype),)

    def read(
        self, piece: jax.Array, shape: tuple[int, int, int], spans: int, *, checked: bool
    ) -> tuple[Pages, jax.Array | None]:
        """A piece -> [X, T, H] of `shape`, with scales [X, T] if the target's pages have scales;
        and bool[spans], whether the checksum of a span is right, or None if not `checked`."""
        if not self.rounded and not checked:
            return _cast(piece.reshape(shape), self.target_dtype), None
        arrays = [_elements(piece, shape, self.dtype)]
        if self.rounded:
            rest = piece[_num_words(shape, self.dtype) :]
            arrays.append(_elements(rest, (*shape[:2], 1), "float32"))
        intact = piece[-spans:] == checksums(arrays, spans) if checked else None
        if not self.rounded:
            return _cast(arrays[0], self.target_dtype), intact
        came = QuantisedPages(arrays[0], arrays[1][..., 0])
        if self.target_dtype in LIMITS:
            return came, intact
        return _cast(decode(*came), self.target_dtype), intact


def _cast(x: jax.Array, dtype: str) -> jax.Array:
    """x in a floating type. What is too large for the type becomes its largest number instead of
    infinite, since V in pages is finite (`pallas_kernels.finite`); NaN stays NaN."""
    most = float(jnp.finfo(dtype).max)
    if most < float(jnp.finfo(x.dtype).max):
        x = jnp.clip(x, -most, most)
    return x.astype(dtype)


def _num_words(shape: tuple[int, ...], dtype: str) -> int:
    return -(-prod(shape) * jnp.dtype(dtype).itemsize // 4)


def _words(array: jax.Array) -> jax.Array:
    """The bits of an array, u32[n]; the last word is filled up with zeros."""
    size = array.dtype.itemsize
    unsigned = lax.bitcast_convert_type(array.reshape(-1), jnp.dtype(f"uint{8 * size}"))
    if size == 4:
        return unsigned
    padded = jnp.pad(unsigned, (0, -array.size % (4 // size)))
    return lax.bitcast_convert_type(padded.reshape(-1, 4 // size), jnp.uint32)


def _elements(words: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """The inverse of `_words`, for the first words of a piece."""
    size = jnp.dtype(dtype).itemsize
    unsigned = lax.bitcast_convert_type(
        words[: _num_words(shape, dtype)], jnp.dtype(f"uint{8 * size}")
    )
    elements = unsigned.reshape(-1)[: prod(shape)].reshape(shape)
    return lax.bitcast_convert_type(elements, jnp.dtype(dtype))
