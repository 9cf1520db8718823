"""Positional I/O on a file, direct where its file system takes that.

Direct I/O goes between a buffer and the device, past the page cache: what a tier holds is not
wanted in memory twice, and its writes must not push out what other processes have cached. Buffers,
lengths and offsets are multiples of `BLOCK` then.
"""

import errno
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

BLOCK = 4096
"""Bytes that direct I/O is aligned to: at least the logical block of any usual disk."""

_MOST_BUFFERS = 1024
"""Most buffers of one call: IOV_MAX of Linux."""


def aligned(nbytes: int) -> np.ndarray:
    """Zeros u8[nbytes] that begin at a page of memory."""
    return np.frombuffer(mmap.mmap(-1, max(1, nbytes)), np.uint8)[:nbytes]


def is_aligned(array: np.ndarray) -> bool:
    """Whether an array begins at a multiple of `BLOCK` in memory."""
    return int(array.__array_interface__["data"][0]) % BLOCK == 0


def open_file(path: Path) -> tuple[int, bool]:
    """Open a file to read and write, and make it if there is none, for this user alone: KV tells
    of prompts.

    Returns:
      its descriptor, and whether its I/O is direct.

    Raises:
      OSError: it cannot be opened so.
    """
    flags = os.O_RDWR | os.O_CREAT
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            file = os.open(path, flags | direct, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            if _reads(file):
                return file, True
            os.close(file)
    return os.open(path, flags, 0o600), False


def _reads(file: int) -> bool:
    """Whether a direct read works: some file systems refuse it only then."""
    try:
        read_at(file, [aligned(BLOCK)], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def read_at(file: int, buffers: Sequence[np.ndarray], offset: int) -> int:
    """Read into buffers of whole blocks u8[n], one after the other, from an offset of the file on.

    Returns:
      bytes that were read; fewer than there is room for where the file ends.
    """
    return _whole(os.preadv, file, buffers, offset)


def write_at(file: int, buffers: Sequence[np.ndarray], offset: int) -> None:
    """Write buffers of whole blocks u8[n], one after the other, from an offset of the file on.

    Raises:
      OSError: they were not all written.
    """
    wanted = sum(buffer.nbytes for buffer in buffers)
    written = _whole(os.pwritev, file, buffers, offset)
    if written < wanted:
        raise OSError(errno.EIO, f"{written} of {wanted} bytes were written at {offset}")


def _whole(
    call: Callable[[int, list[memoryview], int], int],
    file: int,
    buffers: Sequence[np.ndarray],
    offset: int,
) -> int:
    """Repeat a call that may do a part until all is done, or nothing more is; returns the bytes."""
    left, done = [memoryview(buffer) for buffer in buffers], 0
    while left:
        moved = call(file, left[:_MOST_BUFFERS], offset + done)
        done += moved
        if moved == 0 or moved % BLOCK:  # the end of the file, or of what there is room for
            break
        while left and moved >= len(left[0]):
            moved -= len(left.pop(0))
        if left and moved:
            left[0] = left[0][moved:]
    return done
