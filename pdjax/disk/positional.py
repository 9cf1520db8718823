"""Positional I/O on a file, direct where its file system takes that.

Direct I/O goes between a buffer and the device, past the page cache: what a tier holds is not
wanted in memory twice, and its writes must not push out what other processes have cached. Buffers,
lengths and offsets are multiples of `BLOCK` then.
"""

import errno
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

BLOCK = 4096
"""Bytes that direct I/O is aligned to: at least the logical block of any usual disk."""

_OWN = 0o600
"""Mode of a file that this user alone reads and writes: KV tells of prompts."""

_MOST_BUFFERS = 1024
"""Most buffers of one call: IOV_MAX of Linux."""


class ForeignFile(ValueError):
    """A file that is another's, or another thing, and is left as it is."""


def aligned(nbytes: int) -> np.ndarray:
    """Zeros u8[nbytes] that begin at a page of memory."""
    return np.frombuffer(mmap.mmap(-1, max(1, nbytes)), np.uint8)[:nbytes]


def is_aligned(array: np.ndarray) -> bool:
    """Whether an array begins at a multiple of `BLOCK` in memory."""
    return int(array.__array_interface__["data"][0]) % BLOCK == 0


def open_file(path: Path) -> tuple[int, bool]:
    """Open a file to read and write, and make it if there is none, for this user alone.

    Returns:
      its descriptor, and whether its I/O is direct.

    Raises:
      ForeignFile: there is a symbolic link, something else that is no file, or a file of another
        user.
      OSError: it cannot be opened so.
    """
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            file = _open_own(path, direct)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            if _reads(file):
                return file, True
            os.close(file)
    return _open_own(path), False


def _open_own(path: Path, further: int = 0) -> int:
    """Open a file of this user alone, with further flags. Who else can write in the folder may have
    put something there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | further
    try:
        file = os.open(path, flags, _OWN)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise ForeignFile("is a symbolic link; must be a regular file") from error
        raise
    try:
        found, user = os.fstat(file), os.geteuid()
        if not stat.S_ISREG(found.st_mode):
            raise ForeignFile(f"is {stat.filemode(found.st_mode)}; must be a regular file")
        if found.st_uid != user:
            raise ForeignFile(f"is of user {found.st_uid}; must be of this process's, {user}")
        if stat.S_IMODE(found.st_mode) != _OWN:
            os.fchmod(file, _OWN)
    except BaseException:
        os.close(file)
        raise
    return file


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


def keep_data(file: int) -> None:
    """Return when what was written to a file, and how long it is, outlives a loss of power.

    Raises:
      OSError: the disk has not taken it.
    """
    getattr(os, "fdatasync", os.fsync)(file)


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
