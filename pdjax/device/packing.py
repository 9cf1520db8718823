"""Packs several small host arrays into one. Each argument of a program is an upload of its own,
and the cost of a small upload hardly depends on its bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ALIGNMENT = 64
"""Each array begins at a multiple of this many words: 256 bytes, the alignment that GPU kernels
require. XLA may pass a part of the upload to a kernel without a copy, at any alignment."""

Field = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of an array."""


@dataclass(frozen=True)
class Packed:
    """Named arrays of 4-byte elements, one after another, aligned.

    The names, types and shapes are static: JAX compiles a program for them.
    """

    words: Any  # i32[n], numpy or jax: the bits of all elements
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Packed":
        """Pack a copy of numpy arrays."""
        for name, array in arrays.items():
            assert array.dtype.itemsize == 4, f"{name}: {array.dtype} has not 4 bytes an element"
        fields = tuple((name, array.dtype.name, array.shape) for name, array in arrays.items())
        words = np.zeros(sum(_padded(array.size) for array in arrays.values()), np.int32)
        start = 0
        for array in arrays.values():
            words[start : start + array.size] = np.ravel(array).view(np.int32)
            start += _padded(array.size)
        return cls(words, fields)

    def unpack(self) -> dict[str, jax.Array]:
        """Unpack the arrays; to be called within a jitted program."""
        arrays, start = {}, 0
        for name, dtype, shape in self.fields:
            size = int(np.prod(shape))
            words = lax.slice(self.words, (start,), (start + size,)).reshape(shape)
            arrays[name] = lax.bitcast_convert_type(words, jnp.dtype(dtype))
            start += _padded(size)
        return arrays


def _padded(words: int) -> int:
    """Round an array's words up to where the next array begins."""
    return -(-words // ALIGNMENT) * ALIGNMENT


jax.tree_util.register_dataclass(Packed, data_fields=["words"], meta_fields=["fields"])
