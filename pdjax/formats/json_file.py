"""Reads objects from JSON files of other programs; errors name the file, in one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdjax.core.messages import one_line, shown

MAX_BYTES = 128 << 20
"""Largest file that is read: an index of ten thousand tensors has one megabyte."""


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; a key that occurs twice has its last value.

    Raises:
      ValueError: the file is missing, too large, no JSON, nested too deeply, or not an object.
    """
    return parse_json(path, read_text(path, "JSON"))


def read_json_if_any(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; a missing file is an empty object."""
    return read_json(path) if path.is_file() else {}


def read_text(path: Path, what: str = "text") -> str:
    """Read the text of a file; errors call it `what`.

    Raises:
      ValueError: the file is missing, too large, or no UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes; at most {MAX_BYTES}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable {what} ({one_line(error)})") from error


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """Parse `text`, the content of `path`, as a JSON object.

    Raises:
      ValueError: see `read_json`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def read_field(path: Path, values: dict[str, Any], name: str, kind: type, allowed: str) -> Any:
    """Return a field of an object from a file, or None.

    Raises:
      ValueError: the value is neither None nor a `kind`; the message names file and field.
    """
    value = values.get(name)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{path}: {name}={shown(value)}: must be {allowed}")
    return value


@contextmanager
def failures_named(what: str) -> Iterator[None]:
    """Turn any exception inside into a ValueError that begins with `what`.

    The tokenizers package raises bare exceptions, and panics, which are not an `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what} ({one_line(error)})") from error
        raise
