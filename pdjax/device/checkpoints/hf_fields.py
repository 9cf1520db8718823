"""Typed access to the fields of a `config.json`, with errors that say where they are."""

from collections.abc import Mapping
from typing import Any

from pdjax.core.messages import shown
from pdjax.core.model_spec import MAX_NUMBER, MIN_NUMBER

MAX_SIZE = 2**31 - 1


class Fields:
    """A JSON object of a configuration.

    Attributes:
      where: names the file, and the object in it; begins every error.
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self._values = values

    def has(self, name: str) -> bool:
        """Whether the field is written, null included."""
        return name in self._values

    def names(self) -> list[str]:
        """The fields that are written, sorted."""
        return sorted(self._values)

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it is; `default` where it is absent or null."""
        value = self._values.get(name)
        return default if value is None else value

    def refuse(self, name: str, allowed: str) -> ValueError:
        """The error of a field's value, or of its absence."""
        if name not in self._values:
            return ValueError(f"{self.where} {name}=None; allowed: {allowed}; the field is missing")
        return ValueError(f"{self.where} {name}={shown(self._values[name])}; allowed: {allowed}")

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer of at least 1; `default` where the field is absent, not where it is null."""
        value = self._values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(name, "an integer of at least 1")
        if value > MAX_SIZE:
            raise self.refuse(name, f"an integer of at most {MAX_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number; `default` where the field is absent or null."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(name, "a positive number")
        if not MIN_NUMBER <= value <= MAX_NUMBER:
            raise self.refuse(name, f"a positive number, {MIN_NUMBER:g} to {MAX_NUMBER:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false; `default` where the field is absent or null."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def object(self, name: str) -> "Fields":
        """The object under `name`."""
        value = self._values.get(name)
        if not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return Fields(f"{self.where} {name}:", value)
