"""How much of a disk's own rate does the store of the disk tier reach, and how fast does it open?

The ceiling is measured in the same run on the same file system: plain sequential preads and pwrites
of the same bytes, with O_DIRECT, by as many threads. Both files are preallocated, and written once
before they are measured. A disk of a virtual machine may be throttled or cached by its host, so
turns alternate between the two, and medians are compared.

  write     batches of pages into neighbouring slots, over other pages
  read      the same batches
  shuffled  reads of slots in any order
  open      the headers of a file of many slots, of which all are taken
  checksum  what one core can sum up

Predicted before the first run: (1) writes and reads of pages of 2 MiB reach 85% of the ceiling of
as many threads; (2) pages of 64 KiB reach less, since each carries its share of Python; (3) a
million slots open in less than ten seconds.

  python -m experiments.disk_tier --folder=/mnt/nvme --out=results/disk_tier.json
  python -m experiments.disk_tier --total_mb=64 --page_kib=64 --turns=1 --open_slots=1000
"""

import os
import platform
import statistics
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.common.origin import origin, save
from experiments.common.tables import number, percent, table
from pdjax.core.clock import WallClock
from pdjax.disk.checksum import CRC32, FASTEST, SUMS
from pdjax.disk.geometry import Geometry
from pdjax.disk.headers import HEADERS_PER_BLOCK, Identity, SlotContent
from pdjax.disk.positional import BLOCK, aligned, open_file, read_at, write_at
from pdjax.disk.slot_file import SlotFile
from pdjax.disk.slot_store import SlotStore
from pdjax.flags import new_flags, run

MIB = 1 << 20
KINDS = ("write", "read", "shuffled")
_PLAIN_BLOCK = 8 * MIB
_OPEN_PAGE = BLOCK

FLAGS = new_flags()
_FOLDER = flags.DEFINE_string(
    "folder", None, "on the disk to measure; a temporary one unless given", flag_values=FLAGS
)
_TOTAL = flags.DEFINE_integer("total_mb", 1024, "MiB of pages a turn", flag_values=FLAGS)
_PAGES = flags.DEFINE_multi_integer("page_kib", [64, 2048], "KiB of a page", flag_values=FLAGS)
_THREADS = flags.DEFINE_multi_integer("threads", [1, 4], "of the store", flag_values=FLAGS)
_BATCH = flags.DEFINE_integer("batch_mb", 64, "MiB of a batch", flag_values=FLAGS)
_TURNS = flags.DEFINE_integer("turns", 5, "of each measurement", flag_values=FLAGS)
_SLOTS = flags.DEFINE_integer("open_slots", 100_000, "of a file to open", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "results/disk_tier.json", "file to write", flag_values=FLAGS)

_CLOCK = WallClock()


def seconds_of(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = _CLOCK.now()
    call()
    return _CLOCK.now() - started


class Plain:
    """A file that threads write and read from front to end, in large blocks."""

    def __init__(self, folder: Path, nbytes: int, threads: int) -> None:
        self._file, self.direct = open_file(folder / f"plain-{threads}")
        os.posix_fallocate(self._file, 0, nbytes)
        self._block = min(_PLAIN_BLOCK, nbytes)
        self._offsets = range(0, nbytes - self._block + 1, self._block)
        self._buffers = [aligned(self._block) for _ in range(threads)]
        self._threads = ThreadPoolExecutor(threads)
        self.nbytes = len(self._offsets) * self._block

    def move(self, call: Callable[..., object]) -> None:
        """Write or read all of it."""

        def part(thread: int) -> None:
            for offset in self._offsets[thread :: len(self._buffers)]:
                call(self._file, [self._buffers[thread]], offset)

        list(self._threads.map(part, range(len(self._buffers))))

    def close(self) -> None:
        """Let go of the file."""
        self._threads.shutdown()
        os.close(self._file)


class Tier:
    """A store, and batches of pages for it."""

    def __init__(self, folder: Path, nbytes: int, page: int, threads: int, batch: int) -> None:
        pages = max(1, nbytes // page)
        size = Geometry(page, pages).file_bytes
        folder = folder / f"{page}-{threads}"
        self.store = SlotStore(SlotFile(folder, _identity(page), size), threads)
        self._batch = max(1, min(batch // page, pages))
        self._payloads = self.store.buffers(self._batch)
        self._payloads[:] = np.random.default_rng(0).integers(256, size=page, dtype=np.uint8)
        self._slots, self._turn = list(range(pages - pages % self._batch)), 0
        self.nbytes = len(self._slots) * page

    def _batches(self, slots: Sequence[int]) -> Iterator[list[SlotContent]]:
        for first in range(0, len(slots), self._batch):
            some = slots[first : first + self._batch]
            yield [SlotContent(slot, _key(slot, self._turn)) for slot in some]

    def write(self) -> None:
        """Write all slots, with keys of this turn."""
        self._turn += 1
        for batch in self._batches(self._slots):
            self.store.write(batch, self._payloads).result()

    def read(self, shuffled: bool = False) -> None:
        """Read all slots."""
        slots = self._slots
        if shuffled:
            slots = np.random.default_rng(self._turn).permutation(slots).tolist()
        for batch in self._batches(slots):
            assert all(self.store.read(batch, self._payloads).result())


def _identity(page: int) -> Identity:
    return Identity(bytes(16), bytes(16), page)


def _key(slot: int, turn: int) -> bytes:
    return slot.to_bytes(8, "little") + turn.to_bytes(8, "little")


def rates(folder: Path, page: int, threads: int, total: int, batch: int, turns: int) -> Any:
    """MB/s of each kind, of the store and of the plain file, and the ratios of the medians."""
    plain, tier = Plain(folder, total, threads), Tier(folder, total, page, threads, batch)
    calls: dict[str, tuple[Callable[[], None], Callable[..., object]]] = {
        "write": (tier.write, write_at),
        "read": (tier.read, read_at),
        "shuffled": (lambda: tier.read(shuffled=True), read_at),
    }
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for turn in range(turns + 1):
        for kind, (of_tier, of_plain) in calls.items():
            both = seconds_of(of_tier), seconds_of(partial(plain.move, of_plain))
            if turn:  # the first one writes into room that nothing was written to
                taken[kind].append(both)
    direct = tier.store.file.direct and plain.direct
    tier.store.close()
    plain.close()
    point: dict[str, Any] = {"page_kib": page // 1024, "threads": threads, "direct": direct}
    for kind, times in taken.items():
        took, plain_took = map(statistics.median, zip(*times, strict=True))
        mine, ceiling = tier.nbytes / 1e6 / took, plain.nbytes / 1e6 / plain_took
        point[kind] = {"mb_s": mine, "plain_mb_s": ceiling, "ratio": mine / ceiling}
    return point


def opening(folder: Path, slots: int) -> dict[str, Any]:
    """Seconds to open a file whose slots are all taken, and to list what lies there."""
    size, identity = Geometry(_OPEN_PAGE, slots).file_bytes, _identity(_OPEN_PAGE)
    store = SlotStore(SlotFile(folder, identity, size))
    batch = min(slots, 64 * HEADERS_PER_BLOCK)
    pages = store.buffers(batch)
    for first in range(0, slots, batch):
        some = range(first, min(first + batch, slots))
        store.write([SlotContent(s, _key(s, 0)) for s in some], pages[: len(some)]).result()
    store.close()
    started = _CLOCK.now()
    file = SlotFile(folder, identity, size)
    scanned = _CLOCK.now()
    found = len(file.contents())
    listed = _CLOCK.now()
    file.close()
    assert found == slots
    return {"slots": slots, "scan_s": scanned - started, "list_s": listed - scanned}


def checksum_rates(nbytes: int = 2 * MIB, turns: int = 20) -> dict[str, float]:
    """GB/s of one core, of the checksum in use and of those of the standard library."""
    data = np.random.default_rng(0).integers(256, size=nbytes, dtype=np.uint8)
    sums: Mapping[str, Callable[[], object]] = {
        "in use": lambda: SUMS[FASTEST](data),
        "zlib.crc32": lambda: SUMS[CRC32](data),
        "zlib.adler32": lambda: zlib.adler32(memoryview(data)),
        "hashlib.blake2b": lambda: blake2b(memoryview(data)).digest(),
    }
    return {
        name: nbytes / 1e9 / min(seconds_of(call) for _ in range(turns))
        for name, call in sums.items()
    }


def show(points: list[dict[str, Any]]) -> str:
    """Make the table, a row for each size of a page and number of threads."""
    heads = [f"{kind}, MB/s{extra}" for kind in KINDS for extra in ("", " plain", " ratio")]
    rows = [
        [f"{point['page_kib']} KiB, {point['threads']}"]
        + [
            text
            for kind in KINDS
            for text in (
                number(point[kind]["mb_s"], 0),
                number(point[kind]["plain_mb_s"], 0),
                percent(point[kind]["ratio"]),
            )
        ]
        for point in points
    ]
    return table(["page, threads", *heads], rows)


def main() -> None:
    """Measure, print, save; see the module."""
    total, batch = (_TOTAL.value or 0) * MIB, (_BATCH.value or 0) * MIB
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as name:
        folder = Path(name)
        points = [
            rates(folder, kib * 1024, threads, total, batch, _TURNS.value or 1)
            for kib in _PAGES.value or ()
            for threads in _THREADS.value or ()
        ]
        opened = opening(folder / "open", _SLOTS.value or 1)
    sums = checksum_rates()
    print(show(points))
    print(f"open: {opened['slots']:,} slots in {opened['scan_s']:.2f} s")
    print(", ".join(f"{name} {rate:.2f} GB/s" for name, rate in sums.items()))
    whole = {"processor": platform.processor() or platform.machine(), "points": points}
    save(origin() | whole | {"open": opened, "checksums_gb_s": sums}, _OUT.value)


if __name__ == "__main__":
    run(main, FLAGS, __doc__ or "")
