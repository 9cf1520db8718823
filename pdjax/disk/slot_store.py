"""The disk tier's store: pages by the hash that names them, in slots of a file.

Whoever asks chooses the slots, as the host chooses the pages of every pool. The store knows what
lies where, and never gives out what is not what it should be: each payload that is read is held
against the checksum in its header, and a slot whose payload is another is counted and emptied.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np

from pdjax.core.clock import Clock, WallClock
from pdjax.core.messages import shown
from pdjax.disk.checksum import FASTEST, SUMS
from pdjax.disk.headers import KEY_BYTES, SlotContent
from pdjax.disk.positional import aligned, is_aligned
from pdjax.disk.slot_file import SlotFile
from pdjax.disk.work import DiskThreads, DiskTicket, Part

ResultT = TypeVar("ResultT")

Rows = Sequence[np.ndarray] | np.ndarray
"""Payloads, one a row."""


@dataclass
class StoreCounters:
    """What a store holds, and what it has done since it was opened.

    Attributes:
      slots: of the file.
      kept: slots that hold a page.
      busy_bytes: of payloads that are to be read or written and are not yet.
      written, read: pages. What was found to be corrupt is not among them.
      written_bytes, read_bytes: of their payloads.
      write_seconds, read_seconds: that threads took, checksums included. Several may read at once.
      missed: pages that did not lie where they were asked for.
      corrupt: payloads that were not what their headers said, or could not be read.
      evicted: pages whose slots were given to others.
      failed: pages that could not be written.
      dropped: see `SlotFile`.
    """

    slots: int
    kept: int = 0
    busy_bytes: int = 0
    written: int = 0
    read: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    write_seconds: float = 0.0
    read_seconds: float = 0.0
    missed: int = 0
    corrupt: int = 0
    evicted: int = 0
    failed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, int | float]:
        """Plain values by name; what was dropped, for whatever reason, as one."""
        return {**vars(self), "dropped": sum(self.dropped.values())}


class SlotStore:
    """Reads and writes slots of a file with a few threads. Calls return at once, and may come from
    several threads.

    Args:
      file: the store's from now on.
      threads: so many parts of batches are read or written at once.
      part_bytes: of the payloads of a part, which a thread reads or writes at once; at least one
        page.
      most_bytes: of the payloads in flight; see `DiskThreads`.
      clock: tells how long reads and writes take.
    """

    def __init__(
        self,
        file: SlotFile,
        threads: int = 4,
        part_bytes: int = 4 << 20,
        most_bytes: int = 256 << 20,
        clock: Clock | None = None,
    ) -> None:
        self.file = file
        self._clock: Clock = clock or WallClock()
        self._lock = threading.Lock()
        self._counters = StoreCounters(slots=file.geometry.slots, dropped=file.dropped)
        self._slots = {each.key: each.slot for each in file.contents()}
        self._part_pages = max(1, part_bytes // file.geometry.stride)
        self._scratch = threading.local()
        self._threads = DiskThreads(threads, most_bytes)
        self._closed = False

    @property
    def payload_bytes(self) -> int:
        """Bytes of a page."""
        return self.file.geometry.payload_bytes

    def counters(self) -> StoreCounters:
        """A copy of the counters."""
        busy = self._threads.busy_bytes
        with self._lock:
            kept, dropped = len(self._slots), Counter(self._counters.dropped)
            return replace(self._counters, kept=kept, busy_bytes=busy, dropped=dropped)

    def find(self, key: bytes) -> int | None:
        """The slot in which a page lies."""
        with self._lock:
            return self._slots.get(key)

    def buffers(self, pages: int) -> np.ndarray:
        """Zeros u8[pages, stride] for payloads, which lie at the beginnings of the rows: they are
        written and read without another copy."""
        stride = self.file.geometry.stride
        return aligned(pages * stride).reshape(pages, stride)

    def write(self, contents: Sequence[SlotContent], payloads: Rows) -> DiskTicket[int]:
        """Write pages into slots, in place of what is there. A page can be read once it is written,
        and not before.

        Args:
          contents: of slots that differ.
          payloads: u8[payload_bytes] of each, or rows of `buffers`. They must stay as they are
            until the ticket is ready.

        Returns:
          a ticket of the number of pages. It raises an OSError if the disk has failed; then each of
          the slots holds its new page or nothing.

        Raises:
          ValueError: a slot that does not exist or is named twice, or a key or payload of another
            size.
          DiskBusy, DiskClosed: see `DiskThreads`.
        """
        self._check(contents, payloads)
        for each in contents:
            if len(each.key) != KEY_BYTES:
                raise ValueError(f"key={each.key!r}: must be {KEY_BYTES} bytes")
        write = partial(self._write, self.file.next_use())
        return self._ask(contents, payloads, write, False, lambda: len(contents))

    def read(self, contents: Sequence[SlotContent], payloads: Rows) -> DiskTicket[tuple[bool, ...]]:
        """Read pages from slots.

        Args:
          contents: of slots that differ; `place` says nothing here.
          payloads: u8[payload_bytes] of each, or rows of `buffers`, which are filled.

        Returns:
          a ticket that says of each page whether it has come. Where it has not (another page lies
          in the slot, or a corrupt one, which is dropped) the payload means nothing.

        Raises:
          ValueError: as in `write`.
          DiskBusy, DiskClosed: see `DiskThreads`.
        """
        self._check(contents, payloads)
        came, generation = dict[int, bool](), self.file.next_use()

        def read(part: Sequence[SlotContent], rows: Sequence[np.ndarray]) -> None:
            came.update(self._read(generation, part, rows))

        slots = [each.slot for each in contents]
        return self._ask(contents, payloads, read, True, lambda: tuple(came[at] for at in slots))

    def drop(self, slots: Sequence[int]) -> DiskTicket[int]:
        """Empty slots, also on the disk; a ticket of how many were named.

        Raises:
          ValueError: as in `write`.
          DiskClosed: see `DiskThreads`.
        """
        contents = [SlotContent(slot, b"") for slot in slots]
        self._check(contents, [])
        return self._ask(contents, [], lambda part, _: self._drop(part), False, lambda: len(slots))

    def close(self) -> None:
        """Do what has been begun, drop what waits, and let go of the file. A second call does
        nothing."""
        self._threads.close()
        if not self._closed:
            self._closed = True
            self.file.close()

    def _check(self, contents: Sequence[SlotContent], payloads: Rows) -> None:
        slots, geometry = [each.slot for each in contents], self.file.geometry
        if len(set(slots)) < len(slots):
            raise ValueError(f"slots={shown(slots)}: must differ from one another")
        for slot in slots:
            if not 0 <= slot < geometry.slots:
                raise ValueError(f"slot={slot}: must be in [0, {geometry.slots})")
        sizes = geometry.payload_bytes, geometry.stride
        for payload in payloads:
            right = payload.dtype == np.uint8 and payload.shape in [(size,) for size in sizes]
            if not right or not payload.flags.c_contiguous:
                raise ValueError(
                    f"payload: {payload.dtype}{list(payload.shape)}; must be uint8[{sizes[0]}], or "
                    f"a row of `buffers`, uint8[{sizes[1]}], in one piece"
                )

    def _ask(
        self,
        contents: Sequence[SlotContent],
        payloads: Rows,
        work: Callable[[Sequence[SlotContent], Sequence[np.ndarray]], None],
        first: bool,
        outcome: Callable[[], ResultT],
    ) -> DiskTicket[ResultT]:
        """Cut a batch into parts, each of neighbouring slots as far as there are such."""
        order = sorted(range(len(contents)), key=lambda at: contents[at].slot)
        cuts = range(0, len(order), self._part_pages)
        ticket = DiskTicket(len(cuts), outcome)
        parts = []
        for cut in cuts:
            places = order[cut : cut + self._part_pages]
            members = [contents[at] for at in places]
            rows = [payloads[at] for at in places] if len(payloads) else []
            slots = frozenset(each.slot for each in members)
            nbytes = len(rows) * self.payload_bytes
            parts.append(Part(slots, nbytes, first, partial(work, members, rows), ticket))
        self._threads.ask(parts)
        return ticket

    def _write(
        self, generation: int, contents: Sequence[SlotContent], payloads: Sequence[np.ndarray]
    ) -> None:
        started, size = self._clock.now(), self.payload_bytes
        evicted = self._forget(each.slot for each in contents)
        rows = self._rows(payloads)
        for row, payload in zip(rows, payloads, strict=True):
            if row is not payload:
                row[:size] = payload[:size]
        sums = [SUMS[FASTEST](row[:size]) for row in rows]
        try:
            self.file.put(contents, rows, sums, generation)
        except OSError:
            with self._lock:
                self._counters.failed += len(contents)
            raise
        finally:
            with self._lock:
                self._counters.evicted += evicted
                self._counters.write_seconds += self._clock.now() - started
        with self._lock:
            self._slots.update((each.key, each.slot) for each in contents)
            self._counters.written += len(contents)
            self._counters.written_bytes += len(contents) * size

    def _read(
        self, generation: int, contents: Sequence[SlotContent], payloads: Sequence[np.ndarray]
    ) -> dict[int, bool]:
        started, size = self._clock.now(), self.payload_bytes
        came = {each.slot: self._holds(each) for each in contents}
        here = [at for at, each in enumerate(contents) if came[each.slot]]
        slots, rows = [contents[at].slot for at in here], self._rows([payloads[at] for at in here])
        read, wrong = self._get(slots, rows), list[int]()
        for at, row, slot in zip(here, rows, slots, strict=True):
            if slot not in read or not self.file.headers.holds(slot, row[:size]):
                wrong.append(slot)
            elif row is not payloads[at]:
                payloads[at][:size] = row[:size]
        came.update(dict.fromkeys(wrong, False))
        with contextlib.suppress(OSError):  # the slots count as empty all the same
            self._drop([SlotContent(slot, b"") for slot in wrong])
        right = [slot for slot in slots if came[slot]]
        self.file.use(right, generation)
        with self._lock:
            counters = self._counters
            counters.missed += len(contents) - len(slots)
            counters.corrupt += len(wrong)
            counters.read += len(right)
            counters.read_bytes += len(right) * size
            counters.read_seconds += self._clock.now() - started
        return came

    def _get(self, slots: list[int], rows: list[np.ndarray]) -> set[int]:
        """Read payloads; returns the slots of those that can be read."""
        try:
            self.file.get(slots, rows)
        except OSError:
            if len(slots) == 1:
                return set()
            alone = (self._get([slot], [row]) for slot, row in zip(slots, rows, strict=True))
            return set().union(*alone)
        return set(slots)

    def _drop(self, contents: Sequence[SlotContent]) -> None:
        self._forget(each.slot for each in contents)
        self.file.clear(each.slot for each in contents)

    def _holds(self, content: SlotContent) -> bool:
        headers = self.file.headers
        return not headers.is_empty(content.slot) and (
            headers.content(content.slot).key == content.key
        )

    def _forget(self, slots: Iterable[int]) -> int:
        """Let what lies in slots not be found any more; returns how many held something."""
        headers = self.file.headers
        kept = [headers.content(slot) for slot in slots if not headers.is_empty(slot)]
        with self._lock:
            for each in kept:
                if self._slots.get(each.key) == each.slot:
                    del self._slots[each.key]
        return len(kept)

    def _rows(self, payloads: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Rows u8[stride] for payloads: themselves where I/O can take them as they are, else the
        thread's own."""
        stride, direct = self.file.geometry.stride, self.file.direct
        if all(each.nbytes == stride and (is_aligned(each) or not direct) for each in payloads):
            return list(payloads)
        if not hasattr(self._scratch, "rows"):
            self._scratch.rows = self.buffers(self._part_pages)
        return list(self._scratch.rows[: len(payloads)])
