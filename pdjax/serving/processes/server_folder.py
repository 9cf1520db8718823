"""The folder that the processes of one server share. A server that is killed leaves it behind, and
the next one removes it."""

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "pdjax-serve-"
LOCK = "lock"
"""The file of a folder that its owner holds locked as long as it lives."""


class ServerFolder:
    """A folder of this process alone. Those that dead processes of this user have left are removed.

    Attributes:
      path: where it is, until `close`.
    """

    def __init__(self) -> None:
        temporary = Path(tempfile.gettempdir())
        for left in temporary.glob(f"{PREFIX}*"):
            _remove_if_left(left)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temporary))
        # It bears its name only once it is locked: what has no such file is just being made.
        new = self.path / f"{LOCK}.new"
        self._lock = os.open(new, os.O_CREAT | os.O_WRONLY, 0o600)  # no child has it
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        new.rename(self.path / LOCK)

    def close(self) -> None:
        """Remove the folder; a second call does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of this user's whose lock nobody holds; leave what is anything else."""
    with suppress(OSError):  # another process has just removed it
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return
        lock = os.open(folder / LOCK, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)
