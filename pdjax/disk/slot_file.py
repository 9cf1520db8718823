"""A file of slots of one size, each with a payload and a header that says what it is.

The order of writes keeps the file true at any moment: a slot that is written anew loses its header
first, then its payload is written, then its new header. The kernel carries out the writes of a
process that is killed as far as they were asked, so no header is ever found over another payload.
After a crash of the machine, whose disk may have kept a later write and not an earlier one, the
checksum of the payload tells; whoever reads a slot compares it (`slot_store.py`).
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np

from pdjax.core.messages import shown
from pdjax.disk.checksum import FASTEST, XXH3
from pdjax.disk.geometry import Geometry
from pdjax.disk.headers import HEADERS_PER_BLOCK, VERSION, Headers, Identity, SlotContent
from pdjax.disk.positional import (
    BLOCK,
    ForeignFile,
    aligned,
    keep_data,
    open_file,
    read_at,
    write_at,
)
from pdjax.disk.superblock import Superblock

FILE_NAME = "kv.slots"
"""Of the slot file in its folder."""

_LOCKS = 64
"""Blocks of headers that can be written at once."""

_SCAN_THREADS = 16
"""Blocks of headers that are read at once at a start; a disk answers many reads in the time of
one."""

_SCAN_GROUPS = 64
"""Blocks that a thread reads before it takes the next ones."""

_LOG = logging.getLogger("pdjax")


class SlotFile:
    """One preallocated file of slots. One process at a time has it open.

    A file of another model, layout or format version holds nothing of use: what it holds is dropped
    and counted, and its room is used. A file that is not a slot file of this user is left alone.

    Methods may be called by several threads, for different slots.

    Args:
      folder: is made if it does not exist, for this user alone.
      identity: whose KV it holds.
      most_bytes: of the file. A file that was larger is cut, a smaller one grows; what lies in the
        slots that stay is kept.

    Attributes:
      path: the file.
      direct: whether its I/O goes past the page cache.
      geometry: where its slots lie.
      headers: of its slots.
      dropped: slots that were dropped when it was opened, by what was wrong with them: "damaged"
        headers, another "model" or "layout", a "checksum" that cannot be made here, "truncated"
        payloads, a "duplicate" of a key, or "cut off" by a smaller size. A file whose slots have
        another size or "version", and one whose "superblock" is damaged, count as one.

    Raises:
      ValueError: the folder cannot be used, is in use by another process or holds another file of
        that name, or there is no room for so many bytes, or not for one slot in them; with the
        field, its value and what is allowed.
    """

    def __init__(self, folder: str | Path, identity: Identity, most_bytes: int) -> None:
        self.geometry = Geometry.within(identity.payload_bytes, most_bytes)
        if self.geometry.slots < 1:
            raise ValueError(
                f"most_bytes={most_bytes}: must be at least "
                f"{Geometry(identity.payload_bytes, 1).file_bytes}, the bytes of a file of one slot"
            )
        self.path = Path(folder) / FILE_NAME
        self.dropped: Counter[str] = Counter()
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._used: set[int] = set()  # groups with uses that are not written
        self._unsure: set[int] = set()  # empty slots of which the disk may have a header
        self._most_bytes = most_bytes
        with self._named(folder):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file, self.direct = open_file(self.path)
        try:
            with self._named(folder):
                self._lock()
                size = self._check_room()
                self.headers = Headers(identity, self.geometry.groups)
                self._open(size)
        except BaseException:
            os.close(self._file)
            raise
        if FASTEST != XXH3:
            _LOG.warning(
                "%s: CRC-32 sums its pages up, at the cost of a core for each 1.3 GB/s; install "
                "xxhash for a faster checksum",
                self.path,
            )
        if not self.direct:
            _LOG.warning("%s: its file system takes no direct I/O; plain I/O is used", self.path)
        if self.dropped:
            told = ", ".join(f"{many} ({what})" for what, many in self.dropped.items())
            _LOG.warning("%s: what is of no use is dropped: %s", self.path, told)
        table = self.headers.table
        last = max(int(table[name].max()) for name in ("generation", "used"))
        self._generations = count(last + 1)

    @contextlib.contextmanager
    def _named(self, folder: str | Path) -> Iterator[None]:
        """Let an error of the system or of the file name the field that is to be changed."""
        field = f"folder={shown(str(folder))}"
        try:
            yield
        except BlockingIOError as error:
            raise ValueError(
                f"{field}: another process, or another store of this one, has {self.path.name} in "
                "it open; must be a folder of its own"
            ) from error
        except ForeignFile as error:
            raise ValueError(
                f"{field}: {self.path.name} in it {error}; remove it, or name another folder"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ValueError(
                    f"most_bytes={self._most_bytes}: {error.strerror}; must be at most what "
                    f"{field} has room for"
                ) from error
            raise ValueError(
                f"{field}: {error.strerror or error}; must be a folder that this process can write "
                "in"
            ) from error

    def _lock(self) -> None:
        """Keep other processes out. The lock goes with the process, however that ends."""
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _check_room(self) -> int:
        """Bytes of the file as it is; there is room on the disk for what it lacks. That is asked
        first, since to fill a disk up for a moment hurts others who use it."""
        size, free = os.fstat(self._file).st_size, shutil.disk_usage(self.path.parent).free
        lacking = self.geometry.file_bytes - size
        if lacking > free:
            raise OSError(errno.ENOSPC, f"{lacking} bytes more are needed, {free} are free")
        return size

    def _open(self, size: int) -> None:
        """Take over what a file of `size` bytes holds, or make it anew; then it is as long as it is
        to be."""
        wanted = self.geometry.file_bytes
        if self._is_ours(size):
            self._scan(size)
            if size > wanted:
                os.ftruncate(self._file, wanted)
        else:
            self._write_superblock(0)
            os.ftruncate(self._file, BLOCK)
        _preallocate(self._file, wanted)
        self._write_superblock(self.geometry.slots)
        keep_data(self._file)

    def _is_ours(self, size: int) -> bool:
        """Whether slots of this geometry may lie in the file. Counts what else it holds."""
        if size == 0:
            return False
        block = aligned(BLOCK)
        read_at(self._file, [block], 0)
        if not block.any():  # power was lost when its length was on the disk, and no block was
            return False
        found = Superblock.read(block)
        payload_bytes = self.geometry.payload_bytes
        if not found.sound:
            self.dropped["superblock"] += 1
            return True  # each header says for itself whether it is right
        if found.version != VERSION:
            self.dropped["version"] += 1
            return False
        if found.payload_bytes != payload_bytes and found.slots:
            self.dropped["layout"] += 1
        return found.payload_bytes == payload_bytes and found.slots > 0

    def _write_superblock(self, slots: int) -> None:
        write_at(self._file, [Superblock(self.geometry.payload_bytes, slots).block()], 0)

    def _scan(self, size: int) -> None:
        """Read the headers of a file of `size` bytes, and clear those that are not right."""
        geometry = self.geometry
        whole = Geometry.within(geometry.payload_bytes, size)
        headers = Headers(self.headers.identity, max(geometry.groups, whole.groups))
        blocks = headers.blocks

        def read(first: int) -> None:
            for group in range(first, min(first + _SCAN_GROUPS, len(blocks))):
                read_at(self._file, [blocks[group]], geometry.headers_at(group))

        with ThreadPoolExecutor(_SCAN_THREADS, "pdjax scan") as threads:
            list(threads.map(read, range(0, len(blocks), _SCAN_GROUPS)))
        flaws = headers.flaws(geometry.slots, whole.slots)
        self.dropped.update({what: len(slots) for what, slots in flaws.items()})
        headers.cut(geometry.groups)
        self.headers = headers
        last = geometry.groups * HEADERS_PER_BLOCK
        wrong = [slot for slots in flaws.values() for slot in slots[slots < last].tolist()]
        self._change(wrong, self.headers.clear)

    def contents(self) -> list[SlotContent]:
        """What lies in the file, the least recently used first; of what was used at once, the end
        of a sequence before its beginning, without which it cannot be found."""
        table = self.headers.table
        kept = np.flatnonzero(table["magic"])
        kept = kept[np.lexsort((table["place"][kept].astype(np.int64) * -1, table["used"][kept]))]
        return self.headers.contents(kept)

    def next_use(self) -> int:
        """A number for what is written or used at once, which is larger than all before."""
        return next(self._generations)

    def clear(self, slots: Iterable[int]) -> None:
        """Let slots be empty, on the disk when this returns.

        Raises:
          OSError: that was not written.
        """
        unsure, is_empty = self._unsure, self.headers.is_empty
        kept = [slot for slot in slots if slot in unsure or not is_empty(slot)]
        self._change(kept, self.headers.clear)

    def put(
        self,
        contents: Sequence[SlotContent],
        payloads: Sequence[np.ndarray],
        checksums: Sequence[int],
        generation: int,
    ) -> None:
        """Write slots anew. They are empty if this fails.

        Args:
          contents: in ascending order of their slots.
          payloads: u8[geometry.stride] of each; aligned if I/O is direct.
          checksums: of each payload, by `checksum.FASTEST`.
          generation: of `next_use`.

        Raises:
          OSError: something was not written.
        """
        self.clear(each.slot for each in contents)
        for run, offset in self._runs([each.slot for each in contents]):
            write_at(self._file, payloads[run], offset)
        told = {each.slot: (each, sum_) for each, sum_ in zip(contents, checksums, strict=True)}

        def tell(slot: int) -> None:
            self.headers.set(told[slot][0], generation, told[slot][1])

        try:
            self._change(told, tell)
        except OSError:
            self._alter(told, self.headers.clear)
            raise

    def get(self, slots: Sequence[int], payloads: Sequence[np.ndarray]) -> None:
        """Read the payloads of slots in ascending order into u8[geometry.stride] each, aligned if
        I/O is direct. Whether they are right is for their checksums to say.

        Raises:
          OSError: they cannot be read, or not wholly.
        """
        for run, offset in self._runs(slots):
            wanted = sum(buffer.nbytes for buffer in payloads[run])
            if (came := read_at(self._file, payloads[run], offset)) < wanted:
                raise OSError(errno.EIO, f"the file has {came} of {wanted} bytes at {offset}")

    def use(self, slots: Iterable[int], generation: int) -> None:
        """Note a use of each slot, by a number of `next_use`. It is written when a header beside it
        is, or at the end."""
        for slot in slots:
            group = slot // HEADERS_PER_BLOCK
            with self._locks[group % _LOCKS]:
                self.headers.use(slot, generation)
                self._used.add(group)

    def close(self) -> None:
        """Write the uses that were noted, and let other processes open the file. No other method
        may run or be called any more."""
        try:
            for group in sorted(self._used):
                self._write_headers(group)
        finally:
            os.close(self._file)

    def _runs(self, slots: Sequence[int]) -> Iterator[tuple[slice, int]]:
        """Cut ascending slots into runs whose payloads lie side by side; yields each with the
        offset of its first payload."""
        first = 0
        for end in range(1, len(slots) + 1):
            before = slots[end - 1]
            if end == len(slots) or slots[end] != before + 1 or slots[end] % HEADERS_PER_BLOCK == 0:
                yield slice(first, end), self.geometry.payload_at(slots[first])
                first = end

    def _change(self, slots: Iterable[int], change: Callable[[int], None]) -> None:
        """Change the headers of slots, all of them in memory before any block is written."""
        for group, members in self._alter(slots, change).items():
            with self._locks[group % _LOCKS]:
                self._write_headers(group)
                self._unsure.difference_update(members)

    def _alter(
        self, slots: Iterable[int], change: Callable[[int], None]
    ) -> Mapping[int, Sequence[int]]:
        """Change the headers of slots in memory; returns the slots by their groups, whose blocks
        are to be written."""
        groups = defaultdict[int, list[int]](list)
        for slot in slots:
            groups[slot // HEADERS_PER_BLOCK].append(slot)
        for group, members in groups.items():
            with self._locks[group % _LOCKS]:
                for slot in members:
                    change(slot)
                self._unsure.update(members)
        return groups

    def _write_headers(self, group: int) -> None:
        block = self.headers.blocks[group]
        write_at(self._file, [block], self.geometry.headers_at(group))
        self._used.discard(group)


def _preallocate(file: int, nbytes: int) -> None:
    """Make a file at least so long, with its room on the disk where the system can do that."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    elif os.fstat(file).st_size < nbytes:
        os.ftruncate(file, nbytes)
