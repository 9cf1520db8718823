"""Reads the metadata of a GGUF file by key and type; errors name file, key and value."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from pdjax.formats.gguf_file import GGUFFile

_SHOWN = 80
"""Most characters of a value that an error message shows."""


class Metadata:
    """Key-value metadata of a GGUF file, typed.

    Attributes:
      path: the file.
    """

    def __init__(self, path: Path, file: GGUFFile) -> None:
        self.path = path
        self._fields = file.fields
        self._lists: dict[str, list[str]] = {}

    def keys(self, prefix: str) -> list[str]:
        """List the keys that start with `prefix`, in the order of the file."""
        return [key for key in self._fields if key.startswith(prefix)]

    def get(self, key: str) -> Any:
        """Return the value as a number, bool, string or list of them, or None.

        Raises:
          ValueError: a string is not UTF-8.
        """
        value = self._fields.get(key)
        if isinstance(value, bytes):
            return self._decoded(key, value)
        if isinstance(value, np.ndarray):
            return value.tolist()
        if isinstance(value, list):
            if key not in self._lists:
                self._lists[key] = self._strings(key, value)
            return self._lists[key]
        return value

    def length(self, key: str) -> int:
        """Number of elements of an array; 0 if the file has no such array."""
        value = self._fields.get(key)
        return len(value) if isinstance(value, list | np.ndarray) else 0

    def integer(self, key: str, default: int | None = None) -> int:
        """Read an integer; a list of equal ones (some writers store one a layer) counts as one."""
        value = self._value(key, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if type(value) is not int:
            raise self.refuse(key, "one integer", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a finite float."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.refuse(key, "a number", value)
        return _shortest_float(float(value))

    def flag(self, key: str, default: bool) -> bool:
        """Read a bool."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Read a string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, "a string", value)
        return value

    def strings(self, key: str) -> list[str]:
        """Read a list of strings; empty if the file has no such key."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or (value and not isinstance(value[0], str)):
            raise self.refuse(key, "a list of strings", value)
        return value

    def numbers(self, key: str) -> np.ndarray | None:
        """Read a list of numbers as an array; None if the file has no such key."""
        value = self._fields.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype == bool:
            raise self.refuse(key, "a list of numbers")
        return value

    def refuse(self, key: str, allowed: str, value: Any = None) -> ValueError:
        """Make the error for a value of `key` that is not allowed."""
        value = self.get(key) if value is None else value
        shown = repr(_shortest_float(value) if isinstance(value, float) else value)
        if len(shown) > _SHOWN:
            shown = f"{shown[:_SHOWN]}..."
        return ValueError(f"model={str(self.path)!r}: {key}={shown}; allowed: {allowed}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"model={str(self.path)!r}: the GGUF metadata lacks {key}")
        return value

    def _strings(self, key: str, raw: list[bytes]) -> list[str]:
        try:
            return [item.decode() for item in raw]
        except UnicodeDecodeError:
            for index, item in enumerate(raw):
                self._decoded(f"{key}[{index}]", item)
            raise  # not reached: the loop raises for the item that is not UTF-8

    def _decoded(self, key: str, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(
                f"model={str(self.path)!r}: {key}={raw[:_SHOWN]!r}; allowed: UTF-8"
            ) from None


def _shortest_float(value: float) -> float:
    """Return the shortest decimal with the same float32, which the writer meant.

    GGUF stores float32: 1e-5 comes back as 9.99999974e-06.
    """
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if np.isfinite(narrow) else value
