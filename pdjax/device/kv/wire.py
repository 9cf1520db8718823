"""How KV is written for the way from one pool to another, and read back: pure functions within the
programs at both ends.

Exact KV travels as it is, in the narrower of the two pools' types. Rounded KV travels as small
elements with one float32 scale a token and KV head, K and V apart:

    scale = largest magnitude / limit        element = round(x / scale)        x' = element * scale

so that |x - x'| is at most half a scale (int8), or the larger of |x| / 16 and scale / 1024
(float8_e4m3fn), and x' == x wherever x / scale is such an element. A token and head of zeros stays
zeros; one whose largest magnitude is too small for its scale to be a normal float32 (below about
1e-35) becomes zeros; one with a NaN or an infinity in it arrives as NaNs throughout.

Scales and checksums travel in the same piece as what they are of, since each piece of a put has a
price of its own: as words u32[n], elements first.

Dimension key: X heads of several layers, K and V, T tokens, H head dim.
"""

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from pdjax.device.kv.checksums import checksums
from pdjax.kv_layout import KVLayout

LIMITS = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Types to round to, and the largest number that each holds."""


@dataclass(frozen=True)
class Wire:
    """The form of KV between two pools.

    Attributes:
      dtype: of its elements.
      target_dtype: of the pool that it is going to.
    """

    dtype: str
    target_dtype: str

    @classmethod
    def between(cls, source: KVLayout, target: KVLayout, wire_dtype: str | None) -> "Wire":
        """Rounded to `wire_dtype`, or exact.

        Raises:
          ValueError: nothing is rounded to such a type.
        """
        if wire_dtype is not None and wire_dtype not in LIMITS:
            raise ValueError(f"wire_dtype={wire_dtype!r}: allowed are None and {', '.join(LIMITS)}")
        narrower = source if source.itemsize <= target.itemsize else target
        return cls(wire_dtype or narrower.dtype, target.dtype)

    @property
    def rounded(self) -> bool:
        """Whether elements have a scale."""
        return self.dtype in LIMITS

    def head_bytes(self, head_dim: int) -> int:
        """Bytes of one token and KV head, K or V."""
        return head_dim * jnp.dtype(self.dtype).itemsize + 4 * self.rounded

    def write(self, x: jax.Array, spans: int, *, checked: bool) -> jax.Array:
        """x [X, n, S, H] of some spans of tokens -> a piece: [X, n, S, H], or words."""
        if not self.rounded:
            elements, scales = x.astype(self.dtype), []
        else:
            elements, scale = encode(x, self.dtype)
            scales = [scale]
        if not scales and not checked:
            return elements
        tokens = x.shape[1] * x.shape[2]
        arrays = [array.reshape(len(x), tokens, -1) for array in (elements, *scales)]
        words = [_words(array) for array in arrays]
        return jnp.concatenate([*words, checksums(arrays, spans)] if checked else words)

    def read(
        self, piece: jax.Array, shape: tuple[int, int, int], spans: int, *, checked: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """A piece -> [X, T, H] of that shape; and bool[spans], whether a span is as it was
        written."""
        if not self.rounded and not checked:
            return piece.reshape(shape).astype(self.target_dtype), None
        arrays = [_elements(piece, shape, self.dtype)]
        if self.rounded:
            rest = piece[_num_words(shape, self.dtype) :]
            arrays.append(_elements(rest, (*shape[:2], 1), "float32"))
        intact = piece[-spans:] == checksums(arrays, spans) if checked else None
        x = arrays[0] if len(arrays) == 1 else decode(arrays[0], arrays[1])
        return x.astype(self.target_dtype), intact


def encode(x: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """x [..., H] -> elements [..., H] and their scales f32[..., 1]."""
    limit = LIMITS[dtype]
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / limit
    scaled = jnp.clip(x / jnp.where(scale > 0, scale, 1), -limit, limit)
    return (jnp.round(scaled) if dtype == "int8" else scaled).astype(dtype), scale


def decode(elements: jax.Array, scale: jax.Array) -> jax.Array:
    """The inverse, in float32."""
    return elements.astype(jnp.float32) * scale


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
    """The inverse of `_words`, of the first of them."""
    size = jnp.dtype(dtype).itemsize
    unsigned = lax.bitcast_convert_type(
        words[: _num_words(shape, dtype)], jnp.dtype(f"uint{8 * size}")
    )
    elements = unsigned.reshape(-1)[: prod(shape)].reshape(shape)
    return lax.bitcast_convert_type(elements, jnp.dtype(dtype))
