"""From what a user names as a model to its checkpoint."""

from pathlib import Path

from pdjax.device.model.checkpoints.api import Checkpoint
from pdjax.device.model.checkpoints.catalog import CATALOG, fetch
from pdjax.device.model.checkpoints.gguf import GGUFCheckpoint


def open_checkpoint(source: str | Path) -> Checkpoint:
    if str(source) in CATALOG:
        return GGUFCheckpoint(fetch(str(source)))
    return GGUFCheckpoint(Path(source))
