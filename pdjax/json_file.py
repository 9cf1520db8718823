"""Objects in JSON files that somebody else wrote, and values of them in messages of one line."""

import json
import reprlib
from pathlib import Path
from typing import Any

MAX_BYTES = 128 << 20
"""Largest file read: an index of ten thousand tensors has one megabyte."""

_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxdict, _SHOWN.maxlist, _SHOWN.maxtuple = 3, 6, 8, 8
_SHOWN.maxstring, _SHOWN.maxlong, _SHOWN.maxother = 100, 60, 60


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; of a key that occurs twice, the last value.

    Raises:
      ValueError: the file is missing, too large, no JSON, nested too deeply, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes; at most {MAX_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not readable JSON ({reason})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def shown(value: object) -> str:
    """`repr(value)`, shortened where it is long or deep: files may hold megabytes under one key."""
    return _SHOWN.repr(value)
