"""Checks of the fields of a config: what is wrong is named, with its value and what is allowed.

A field is named in one way everywhere, by its dotted path below the config, as it is overridden:
`decode.rows`, and `seed`, whose `owner` is "".
"""

import types
import typing
from typing import Any


def path(owner: str, name: str) -> str:
    """The dotted path of a field of `owner`, itself such a path."""
    return f"{owner}.{name}" if owner else name


def check_types(owner: str, config: object) -> None:
    """Each field of a config has its declared type: a wrong one would fail far from here."""
    for name, hint in typing.get_type_hints(type(config)).items():
        check_type(getattr(config, name), hint, path(owner, name))


def check_type(value: object, hint: Any, name: str) -> None:
    """A value is of a class that the hint allows; a whole number will do for a float."""
    allowed = kinds(hint)
    if type(value) not in allowed and not (float in allowed and type(value) is int):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        raise ValueError(f"{name}={value!r}: must be {names}")


def kinds(hint: Any) -> list[type]:
    """The classes that a field's type hint allows."""
    union = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [typing.get_origin(kind) or kind for kind in union]


def at_least(owner: str, config: object, least: int, *names: str) -> None:
    """Fields that are None or not below `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{path(owner, name)}={value}: must be at least {least}")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """A field whose values can be listed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")


def check_buckets(name: str, buckets: tuple[int, ...] | None) -> None:
    """Padded sizes, if there are any."""
    if buckets is None:
        return
    sizes = [size for size in buckets if type(size) is int and size >= 1]
    if not buckets or sizes != sorted(set(sizes)) or len(sizes) < len(buckets):
        raise ValueError(f"{name}={buckets}: must be whole numbers, positive and increasing")
