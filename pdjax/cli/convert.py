"""`pdjax convert`: write a model as an Orbax checkpoint."""

from pathlib import Path
from typing import Any

from absl import flags

from pdjax.cli.command import Command
from pdjax.config import DTYPES
from pdjax.core.progress import Progress
from pdjax.flags import new_flags

USAGE = """
pdjax convert: write any model that pdjax reads as an Orbax checkpoint, which loads sharded.

  pdjax convert --source=path/to/huggingface/directory --output=path/to/checkpoint --dtype=bfloat16

The result is served with --config.model.source=path/to/checkpoint.
"""

_FLAGS = new_flags()
_OF: dict[str, Any] = {"flag_values": _FLAGS}
_SOURCE = flags.DEFINE_string("source", None, "model to read, any that is served", **_OF)
_OUTPUT = flags.DEFINE_string("output", None, "directory to write", **_OF)
_PROGRESS = flags.DEFINE_bool("progress", True, "tell on stderr what takes long", **_OF)
_DTYPE = flags.DEFINE_enum("dtype", DTYPES[0], DTYPES, "precision of weights", **_OF)


def convert() -> None:
    """`pdjax convert`."""
    if not _SOURCE.value or not _OUTPUT.value:
        raise ValueError("convert: needs both --source=MODEL and --output=DIRECTORY")

    progress = Progress(bool(_PROGRESS.value))
    with progress.phase("importing JAX"):
        from pdjax.convert import convert as write

    with progress.phase(f"converting {_SOURCE.value}"):
        write(_SOURCE.value, _OUTPUT.value, _DTYPE.value)
    files = [file for file in Path(_OUTPUT.value).rglob("*") if file.is_file()]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    print(f"wrote {_OUTPUT.value}: {_DTYPE.value}, {len(files)} files, {megabytes:.0f} MB")


COMMAND = Command(convert, _FLAGS, USAGE)
