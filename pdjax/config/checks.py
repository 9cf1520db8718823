"""Checks of a config's fields. Each error names the field, its value and the allowed values.

A message names a field by its dotted path below the config, as overrides do: `decode.rows`. A field
of the config itself has owner "", so its path is its name: `seed`.
"""

import dataclasses
import types
import typing
from pathlib import PurePath
from typing import Any

from pdjax.core.messages import shown

MOST_DEVICES = 1024
"""Most devices of a run, over all engines: making this many CPU devices takes six seconds."""
MOST_TOKENS = 2**30
"""Longest context: positions and slots are 32-bit integers."""
MOST_STEP_TOKENS = 2**20
"""Most tokens of a prefill step."""
MOST_ROWS = 2**16
"""Most sequences of a step."""
MOST_PAGE_SIZE = 2**16
MOST_BUCKETS = 32
"""Most sizes in a list of buckets: the model is compiled for each pair of sizes."""
MOST_SECONDS = 1e9
MOST_ATTEMPTS = 1000
MOST_LOOKAHEAD = 1024
MOST_QUEUED = 2**20
"""Most waiting sequences, and most finished requests on record."""
MOST_LOGPROBS = 2**16
MOST_BYTES = 2**63 - 1


_WORDS = {type(None): "None", bool: "true or false"}
"""What a message calls a class, if not by its name."""


def path(owner: str, name: str) -> str:
    """Join `owner`, a dotted path or "", and a field's name to the field's dotted path."""
    return f"{owner}.{name}" if owner else name


def check_types(owner: str, config: object) -> None:
    """Check that each field has its declared type; a wrong type would fail far from here.

    A Path in a string field is replaced by its string.

    Raises:
      ValueError: a field has another type.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, PurePath):
            object.__setattr__(config, name, value := as_text(value, hint))
        check_type(value, hint, path(owner, name))


def as_text(value: object, hint: Any) -> object:
    """Convert a Path to a string where the type hint allows one; return any other value as is."""
    return str(value) if isinstance(value, PurePath) and str in kinds(hint) else value


def check_type(value: object, hint: Any, name: str) -> None:
    """Check that the type hint allows the value's class. A float field also takes an int, and a
    field of a dataclass also a class that extends it.

    Raises:
      ValueError: the hint does not allow the class.
    """
    allowed = kinds(hint)
    extends = any(isinstance(value, kind) for kind in allowed if dataclasses.is_dataclass(kind))
    wider = float in allowed and type(value) is int
    if type(value) not in allowed and not (extends or wider):
        names = " or ".join(_WORDS.get(kind, kind.__name__) for kind in allowed)
        raise ValueError(f"{name}={shown(value)}: must be {names}")


def kinds(hint: Any) -> list[type]:
    """List the classes that a field's type hint allows."""
    union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [typing.get_origin(kind) or kind for kind in union]


def between(owner: str, config: object, least: int, most: int, *names: str) -> None:
    """Check that each named field is None or in [`least`, `most`]."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if value < least:
            raise ValueError(f"{path(owner, name)}={shown(value)}: must be at least {least}")
        if value > most:
            raise ValueError(f"{path(owner, name)}={shown(value)}: must be at most {most}")


def seconds(owner: str, config: object, *names: str) -> None:
    """Check that each named field is None or in (0, MOST_SECONDS]."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not value > 0:  # also refuses NaN
            raise ValueError(f"{path(owner, name)}={shown(value)}: must be None or above 0 seconds")
        if value > MOST_SECONDS:
            raise ValueError(
                f"{path(owner, name)}={shown(value)}: must be at most {MOST_SECONDS:.0f} seconds, "
                "or None, which has no end"
            )


def share(owner: str, config: object, name: str) -> None:
    """Check that a field is None, or a share, in (0, 1]."""
    value = getattr(config, name)
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"{path(owner, name)}={shown(value)}: must be in (0, 1]")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Check that a field has one of the `allowed` values."""
    if value not in allowed:
        raise ValueError(f"{name}={shown(value)}: allowed are {', '.join(allowed)}")


def check_buckets(name: str, buckets: tuple[int, ...] | None, most: int) -> None:
    """Check that padded sizes are None, or positive, increasing and at most `most`."""
    if buckets is None:
        return
    sizes = [size for size in buckets if type(size) is int and size >= 1]
    if not buckets or sizes != sorted(set(sizes)) or len(sizes) < len(buckets):
        raise ValueError(f"{name}={shown(buckets)}: must be whole numbers, positive and increasing")
    if len(buckets) > MOST_BUCKETS:
        raise ValueError(f"{name}: {len(buckets)} sizes; must be at most {MOST_BUCKETS}")
    if buckets[-1] > most:
        raise ValueError(f"{name}={shown(buckets)}: must be at most {most}")


def check_slots(name: str, pages: int | None, page_size: int) -> None:
    """Check that 32-bit integers can number the slots (one a token) of a pool of `pages` pages."""
    if pages is not None and pages * page_size > 2 * MOST_TOKENS - 1:
        raise ValueError(
            f"{name}={shown(pages)}: must be at most {(2 * MOST_TOKENS - 1) // page_size} pages of "
            f"{page_size} tokens"
        )


def check_folder(name: str, folder: str | None, nowhere: str) -> None:
    """Check that a folder's name is one, or `nowhere`, or None.

    Raises:
      ValueError: no folder can have this name.
    """
    if folder is not None and (folder == "" or "\0" in folder):
        raise ValueError(f"{name}={shown(folder)}: must be a directory, {nowhere!r} or None")
