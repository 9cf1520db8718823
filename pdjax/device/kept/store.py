"""A folder of files by name, of bounded size."""

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path


class Store:
    """Keeps bytes by name. Several processes may use a folder at once: a file is there whole or not
    at all. What cannot be read is not there, and what cannot be written is not kept. A file begins
    with the digest of what follows: a program of which a disk has lost a part may crash a process.

    Args:
      folder: is made if it does not exist, for this user alone.
      most_bytes: of all files together; those used least recently are dropped first. None: no
        bound.
    """

    def __init__(self, folder: Path, most_bytes: int | None) -> None:
        self.folder, self._most_bytes = folder, most_bytes

    def distrusted(self) -> str | None:
        """Why files of the folder may be from others than this user and root, or None. What is kept
        is run, as programs in a folder of `PATH` are: whoever can write there can do what the user
        can."""
        if not hasattr(os, "getuid"):
            return None
        with contextlib.suppress(FileNotFoundError):
            found = self.folder.stat()
            if found.st_uid not in (os.getuid(), 0):
                return f"{self.folder} belongs to another user, {found.st_uid}"
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return f"{self.folder} may be written by others: chmod go-w it, or remove it"
        return None

    def get(self, name: str) -> bytes | None:
        """What is kept by this name."""
        path = self.folder / name
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            digest, kept = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if digest != _digest(kept):
                return None
            with contextlib.suppress(OSError):
                os.utime(path)
            return kept
        return None

    def put(self, name: str, kept: bytes) -> None:
        """Keep it, in place of what was kept by this name."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", delete=False) as file:
                try:
                    file.write(_digest(kept))
                    file.write(kept)
                    file.close()
                    os.replace(file.name, self.folder / name)
                except BaseException:
                    os.unlink(file.name)
                    raise
            self._trim()

    def drop(self, name: str) -> None:
        """Keep nothing by this name."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _trim(self) -> None:
        if self._most_bytes is None:
            return
        with os.scandir(self.folder) as entries:
            files = sorted(
                (each.stat().st_mtime, each.stat().st_size, each.name) for each in entries
            )
        excess = sum(size for _, size, _ in files) - self._most_bytes
        for _, size, name in files:
            if excess <= 0:
                break
            self.drop(name)
            excess -= size


_DIGEST_BYTES = 32


def _digest(kept: bytes) -> bytes:
    return hashlib.blake2b(kept, digest_size=_DIGEST_BYTES).digest()
