"""A model as an Orbax checkpoint, which loads sharded."""

from pathlib import Path

from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.device.checkpoints.orbax import convert as write_checkpoint


def convert(source: str, output: str | Path, dtype: str = "float32") -> None:
    """Write the model `source`, anything that a config may name, as an Orbax checkpoint.

    Raises:
      ValueError: no such model, or `output` exists already.
    """
    write_checkpoint(open_checkpoint(source), Path(output), dtype)
