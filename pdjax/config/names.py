"""The dotted names of a config's fields, and which of them a wrong name may stand for."""

import dataclasses
import difflib
import typing
from typing import Any

from pdjax.config import Config

_LONGEST = 100
"""Most characters of a name that similar ones are looked for."""


def field_names(config: Any = Config, owner: str = "") -> list[str]:
    """List the dotted names of all fields, those of sections in place of the sections."""
    names = []
    for name, hint in typing.get_type_hints(config).items():
        full = f"{owner}{name}"
        names += field_names(hint, f"{full}.") if dataclasses.is_dataclass(hint) else [full]
    return names


def fields_called(name: str) -> list[str]:
    """List the fields whose last part is `name`, or else those of the section `name`."""
    names = field_names()
    called = [each for each in names if each.rpartition(".")[2] == name]
    return called or [each for each in names if each.startswith(f"{name}.")]


def did_you_mean(name: str) -> str:
    """Name the fields or sections that a wrong name may stand for, as the end of a message; "" if
    none is like it."""
    if len(name) > _LONGEST:
        return ""
    names = field_names()
    sections = sorted({each.partition(".")[0] for each in names if "." in each})
    like = fields_called(name.rpartition(".")[2])
    like = like or difflib.get_close_matches(name, names + sections, 1, 0.75)
    return f"; did you mean {' or '.join(like)}?" if like else ""
