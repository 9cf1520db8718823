"""Several small arrays of the host as one: every argument of a program is an upload of its own,
whose price hardly depends on its bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Field = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of an array."""


@dataclass(frozen=True)
class Packed:
    """Named arrays of 4-byte elements, one after another. What they are called, their types and
    shapes are static: a program is compiled for them."""

    words: Any  # i32[n], numpy or jax: the bits of all elements
    fields: tuple[Field, ...]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Packed":
        """A copy of numpy arrays."""
        for name, array in arrays.items():
            assert array.dtype.itemsize == 4, f"{name}: {array.dtype} has not 4 bytes an element"
        fields = tuple((name, array.dtype.name, array.shape) for name, array in arrays.items())
        words = [np.ravel(array).view(np.int32) for array in arrays.values()]
        return cls(np.concatenate(words), fields)

    def unpack(self) -> dict[str, jax.Array]:
        """The arrays, within a program."""
        arrays, start = {}, 0
        for name, dtype, shape in self.fields:
            size = int(np.prod(shape))
            words = lax.slice(self.words, (start,), (start + size,)).reshape(shape)
            arrays[name] = lax.bitcast_convert_type(words, jnp.dtype(dtype))
            start += size
        return arrays


jax.tree_util.register_dataclass(Packed, data_fields=["words"], meta_fields=["fields"])
