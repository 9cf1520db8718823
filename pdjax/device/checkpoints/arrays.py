"""A model that is in memory, such as one that has just been trained."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.api import ALL, check_tensors
from pdjax.text.tokenizer import Tokenizer

SOURCE = "arrays in memory"
"""What messages call such a model."""


class ArrayCheckpoint:
    """Arrays by the names of their tensors; see `Checkpoint`.

    Args:
      spec: architecture of the model.
      arrays: every tensor of the model, [out, in], of experts [expert, out, in], by its name; of
        numpy or of JAX.
      tokenizer: the model's, if it has one.

    Raises:
      ValueError: a tensor is missing, has another shape, has no place in the model, or is not of a
        float type; the message names it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        arrays: Mapping[str, np.ndarray | jax.Array],
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_tensors(SOURCE, spec, {name: np.shape(array) for name, array in arrays.items()})
        for name, array in arrays.items():
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(
                    f"model={SOURCE!r}: tensor {name} is {array.dtype}; must be of a float type"
                )
        self._spec, self._arrays, self._tokenizer = spec, arrays, tokenizer

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    def read(self, name: str, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """See `Checkpoint.read`; in the array's own element type."""
        array = self._arrays[name]
        part = array[rows] if array.ndim == 1 else array.reshape(-1, array.shape[-1])[rows, cols]
        return np.array(part)  # a copy: the caller may write to it
