"""Names of kept programs: a digest of all that their machine code follows from."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pdjax.device.compat import are_alike, jax_settings, topology_of

_OURS = "pdjax", "pallas_kernels"
_PLAIN = type(None), bool, int, float, str, bytes, PartitionSpec, np.dtype
_FLAGS = "XLA_FLAGS", "LIBTPU_INIT_ARGS"


class Unkept(Exception):
    """A program that follows from something that has no lasting name."""


def key_of(name: str, facts: Iterable[Any], shapes: Any, devices: tuple[jax.Device, ...]) -> str:
    """A file name for a program.

    Args:
      name: of what builds it.
      facts: what that was given.
      shapes: of the program's arguments; its `str` says all.
      devices: that the program runs on.

    Raises:
      Unkept: a fact is of code outside pdjax, which nobody watches for changes; our own has
        changed; or the devices have no lasting name.
    """
    told = name, [described(fact) for fact in facts], str(shapes), _surroundings(devices)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def described(fact: Any) -> Any:
    """A fact as a text, or lists of texts, that are the same in every process.

    Raises:
      Unkept: there is none.
    """
    if isinstance(fact, _PLAIN) or type(fact).__module__.startswith("jaxlib."):
        return repr(fact)  # a PyTreeDef, too
    if isinstance(fact, tuple | list | range):
        return [described(each) for each in fact]
    if isinstance(fact, Mapping):
        return [[described(key), described(value)] for key, value in fact.items()]
    if isinstance(fact, Mesh):
        axes = zip(fact.axis_names, fact.devices.shape, fact.axis_types, strict=True)
        return [repr(list(axes)), _places(tuple(fact.devices.flat))]
    if isinstance(fact, NamedSharding):
        return [described(fact.mesh), repr(fact.spec), repr(fact.memory_kind)]
    kind = fact if isinstance(fact, type) else type(fact)
    if kind.__module__.partition(".")[0] not in _OURS:
        raise Unkept(f"{kind.__module__}.{kind.__qualname__}")
    if isinstance(fact, type):
        inside: Any = ()
    elif is_dataclass(fact):
        inside = {each.name: getattr(fact, each.name) for each in fields(fact)}
    else:
        inside = vars(fact)
    return [kind.__module__, kind.__qualname__, described(inside)]


def _places(devices: tuple[jax.Device, ...]) -> list[int]:
    """Where devices are, as far as a program depends on it: engines alike share their programs."""
    return [len(devices)] if are_alike(devices) else [device.id for device in devices]


def _surroundings(devices: tuple[jax.Device, ...]) -> tuple[Any, ...]:
    """What every program on these devices depends on: our code, JAX and its settings, XLA and its
    flags, the devices, of a CPU also its instruction sets.

    Raises:
      Unkept: the code has changed since it was imported, or the devices have no lasting name.
    """
    flags = [os.environ.get(name) for name in _FLAGS]
    try:
        topology = topology_of(devices)
    except jax.errors.JaxRuntimeError as error:
        raise Unkept(f"devices of {devices[0].platform}") from error
    return source_digest(), jax_settings(), flags, topology


def source_digest() -> str:
    """A digest of our source, all of it: which part a program follows from is not known.

    Raises:
      Unkept: it has changed since it was imported, so that the process runs another.
    """
    if _stamps() != _IMPORTED:
        raise Unkept("source that has changed")
    return _digest()


@cache
def _digest() -> str:
    digest = hashlib.sha256()
    for name, path in _sources():
        digest.update(name.encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _sources() -> list[tuple[str, Path]]:
    """Our files as they were at first, by their names."""
    found = []
    for package in _OURS:
        [folder] = map(Path, import_module(package).__path__)
        found += [(str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*.py"))]
    return found


def _stamps() -> list[tuple[int, int]]:
    """When each of them was written last, and its size; none of files that are gone."""
    with suppress(OSError):
        stats = [path.stat() for _, path in _sources()]
        return [(each.st_mtime_ns, each.st_size) for each in stats]
    return []


_IMPORTED = _stamps()
"""Those of the code that this process runs."""
