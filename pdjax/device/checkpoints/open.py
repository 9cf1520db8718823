"""From what a user names as a model to its checkpoint."""

from pathlib import Path

from pdjax.core.messages import shown
from pdjax.device.checkpoints.api import Checkpoint
from pdjax.device.checkpoints.catalog import CATALOG, fetch
from pdjax.device.checkpoints.gguf import GGUFCheckpoint
from pdjax.device.checkpoints.hf_config import CONFIG_FILE
from pdjax.device.checkpoints.hub import fetch_from_hub, hub_id
from pdjax.device.checkpoints.huggingface import HuggingFaceCheckpoint
from pdjax.device.checkpoints.orbax import SPEC_FILE, OrbaxCheckpoint
from pdjax.formats.gguf_file import starts_like_gguf


def open_checkpoint(source: str | Path) -> Checkpoint:
    """The model that `source` names: a name in the catalogue, a GGUF file, a directory, or an
    id of the Hugging Face Hub (`ORGANISATION/NAME[@REVISION]`), unless a path of that name exists.

    Raises:
      ValueError: `source` is none of these, or the model cannot be read; see the formats.
    """
    try:
        return _open(source)
    except OSError as error:  # a name that no file can have
        raise ValueError(f"model={shown(str(source))}: {error.strerror}") from error


def _open(source: str | Path) -> Checkpoint:
    if str(source) in CATALOG:
        return GGUFCheckpoint(fetch(str(source)))
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf" or starts_like_gguf(path):
        return GGUFCheckpoint(path)
    if (path / SPEC_FILE).is_file():
        return OrbaxCheckpoint(path)
    if (path / CONFIG_FILE).is_file():
        return HuggingFaceCheckpoint(path)
    found = None if path.exists() else hub_id(str(source))
    if found is not None:
        return HuggingFaceCheckpoint(fetch_from_hub(*found))
    what = "holds no model" if path.is_dir() else "is no known model"
    raise ValueError(
        f"model={shown(str(source))}: {what}; allowed: a name ({', '.join(CATALOG)}), "
        f"a file NAME.gguf, a Hugging Face directory with {CONFIG_FILE} and safetensors, "
        "a directory written by `pdjax convert`, or an id of the Hugging Face Hub, "
        "ORGANISATION/NAME[@REVISION]"
    )
