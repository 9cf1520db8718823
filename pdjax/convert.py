"""Models as Orbax checkpoints, which load sharded."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.arrays import ArrayCheckpoint
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.checkpoints.orbax import convert as write_checkpoint
from pdjax.text.tokenizer import Tokenizer


def convert(source: str, output: str | Path, dtype: str = "float32") -> None:
    """Write the model `source`, anything that a config may name, as an Orbax checkpoint.

    Raises:
      ValueError: no such model, or `output` exists already.
    """
    write_checkpoint(open_checkpoint(source), Path(output), dtype)


def save_checkpoint(
    output: str | Path,
    spec: ModelSpec,
    arrays: Mapping[str, np.ndarray | jax.Array],
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "float32",
) -> None:
    """Write a model that is in memory, such as one just trained, as an Orbax checkpoint.

    Args:
      output: the directory to write.
      spec: architecture of the model.
      arrays: every tensor of the model, [out, in], by its Hugging Face name, such as
        "model.layers.0.mlp.up_proj.weight".
      tokenizer: the model's; without one its prompts must be token ids.
      dtype: the element type to write, "float32" or "bfloat16".

    Raises:
      ValueError: a tensor is missing, has another shape or no place in the model, `dtype` is not
        allowed, or `output` exists already.
    """
    write_checkpoint(ArrayCheckpoint(spec, arrays, tokenizer), Path(output), dtype)
