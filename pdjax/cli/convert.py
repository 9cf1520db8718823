"""`pdjax convert`: write a model as an Orbax checkpoint."""

from typing import Any

from absl import flags

from pdjax.cli.command import Command
from pdjax.config import DTYPES
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
_DTYPE = flags.DEFINE_enum("dtype", DTYPES[0], DTYPES, "precision of weights", **_OF)


def convert() -> None:
    """`pdjax convert`."""
    if not _SOURCE.value or not _OUTPUT.value:
        raise ValueError("convert: needs both --source=MODEL and --output=DIRECTORY")

    from pdjax.convert import convert as write

    write(_SOURCE.value, _OUTPUT.value, _DTYPE.value)


COMMAND = Command(convert, _FLAGS, USAGE)
