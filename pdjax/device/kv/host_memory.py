"""Measures how much host memory the process may still take, with the standard library alone."""

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 1 << 60
"""A limit of this many bytes means no limit; control groups of version 1 write a large number."""


def available_bytes(root: Path = _ROOT) -> int | None:
    """Return the bytes that can be allocated without swapping; None where the system does not tell.

    On Linux it is the least of the memory that the kernel counts as available and of what each
    control group above this process (a container, a batch job) leaves of its limit. Elsewhere it is
    half of the physical memory, since the use by other programs is unknown.

    Args:
      root: folder that holds `proc` and `sys`.
    """
    known = [*_meminfo(root / "proc/meminfo"), *_control_groups(root)]
    if known:
        return max(0, min(known))
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):  # no such function, or no such name
        return None


def _meminfo(file: Path) -> Iterator[int]:
    for line in _lines(file):
        name, _, rest = line.partition(":")
        if name == "MemAvailable" and (words := rest.split()) and words[0].isdecimal():
            yield int(words[0]) * 1024


def _control_groups(root: Path) -> Iterator[int]:
    """Yield the bytes that each control group leaves of its limit.

    Inactive pages of files do not count as used: the kernel drops them when memory is needed.
    """
    for line in _lines(root / "proc/self/cgroup"):
        parts = line.split(":", 2)
        if len(parts) < 3:
            continue
        _, controllers, path = parts
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Within a container the path may name folders that exist only outside of it.
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit - max(0, used - _unused_files(folder / "memory.stat"))
            if folder == top:
                break


def _unused_files(file: Path) -> int:
    for line in _lines(file):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.strip().isdecimal():
            return int(value)
    return 0


def _number(file: Path) -> int | None:
    """Read the number in a file; None where the file is missing or holds "max"."""
    for line in _lines(file):
        if line.strip().isdecimal():
            return int(line)
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("ascii", "replace").splitlines()
    except OSError:
        return []
