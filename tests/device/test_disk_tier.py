"""Pages between a tier in host memory and a tier on a disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.device.kv.disk_tier import DiskTransport, disk_pool
from pdjax.device.worker import DispatchFuture, DispatchWorker, Done
from pdjax.disk.geometry import Geometry
from pdjax.disk.headers import Identity
from pdjax.disk.slot_file import FILE_NAME, SlotFile
from pdjax.disk.slot_store import SlotStore
from pdjax.interfaces.transport import KeptPage, LostPages, TransferJob
from tests.helpers.slots import key

HOST, DISK = PoolId("host/0"), PoolId("disk/0")
LAYOUT = KVLayout.of_heads(2, 1, 8, page_size=4, dtype="float32", itemsize=4)
SLOTS = 12
IDENTITY = Identity.of(bytes(16), LAYOUT)
GEOMETRY = Geometry(LAYOUT.page_bytes, SLOTS)


@dataclass
class Rows:
    """A pool in host memory, with random pages."""

    id: PoolId
    layout: KVLayout
    rows: np.ndarray


class Moving:
    """A transport over a host pool of 9 pages and a store, with jobs for it."""

    def __init__(self, folder: Path) -> None:
        rows = np.random.default_rng(0).integers(256, size=(9, LAYOUT.page_bytes), dtype=np.uint8)
        self.host = Rows(HOST, LAYOUT, rows)
        self.store = SlotStore(SlotFile(folder, IDENTITY, GEOMETRY.file_bytes))
        self.copier = DispatchWorker()
        self.transport = DiskTransport(self.host, DISK, self.store, self.copier)
        self._numbers = count()

    def job(self, source: PoolId, target: PoolId, pages: list[int]) -> TransferJob:
        """A job of pages by their names, of which 0 is padding. Page p of the host holds key(p),
        and so does page p + 2 of the disk."""
        ahead = 2 * (source == DISK)
        contents = tuple(KeptPage(key(page - ahead), page, page) for page in pages if page)
        numbers = np.array(pages, np.int32)
        return TransferJob(
            next(self._numbers),
            source,
            target,
            range(2),
            numbers,
            len(contents),
            contents=contents,
        )

    def down(self, pages: list[int]) -> None:
        job = self.job(HOST, DISK, pages)
        self.transport.send(job).result()
        to = np.array([page + 2 if page else 0 for page in pages], np.int32)
        assert self.transport.write(job.id, to).result() == 0


@pytest.fixture
def moving(tmp_path: Path) -> Iterator[Moving]:
    moving = Moving(tmp_path)
    yield moving
    moving.transport.close()


def test_pages_go_down_and_come_up_elsewhere(moving: Moving):
    before = moving.host.rows.copy()
    moving.down([3, 0, 8, 1])
    moving.host.rows[:] = 0
    job = moving.job(DISK, HOST, [3, 10, 0, 5])
    sent = moving.transport.send(job)
    cost = sent.result()
    sent.read.result()
    assert (cost.bytes, cost.pages) == (3 * LAYOUT.page_bytes, 3)
    # One of them is not wanted any more.
    moving.transport.write(job.id, np.array([7, 0, 0, 2], np.int32)).result()
    assert (moving.host.rows[[7, 2]] == before[[1, 3]]).all()
    assert not moving.host.rows[[0, 1, 3, 4, 5, 6, 8]].any()


def test_a_page_is_read_in_its_turn(moving: Moving):
    """What is written to the page after the job was sent does not go along."""
    before = moving.host.rows[3].copy()

    def overwrite() -> Done[None]:
        moving.host.rows[3] = 0
        return Done(None)

    job = moving.job(HOST, DISK, [3])
    sent = moving.transport.send(job)
    later = DispatchFuture(overwrite)
    moving.copier.give(later)
    later.result()
    sent.result()
    moving.transport.write(job.id, np.array([5], np.int32)).result()
    up = moving.job(DISK, HOST, [5])
    moving.transport.send(up).result()
    moving.transport.write(up.id, np.array([8], np.int32)).result()
    assert (moving.host.rows[8] == before).all()


def test_a_restart_finds_what_went_down(tmp_path: Path):
    first = Moving(tmp_path)
    first.down([3, 8, 1])
    first.transport.close()
    again = Moving(tmp_path)
    pool = disk_pool(DISK, LAYOUT, again.store)
    assert pool.num_pages == SLOTS + 1
    # The end of a sequence goes first.
    assert pool.kept == tuple(KeptPage(key(page), page, page + 2) for page in (8, 3, 1))
    again.transport.close()


def test_a_page_that_the_disk_has_lost_fails_its_job(moving: Moving, tmp_path: Path):
    moving.down([3, 8, 1])
    with open(tmp_path / FILE_NAME, "r+b") as file:
        file.seek(GEOMETRY.payload_at(10 - 1))
        file.write(bytes(LAYOUT.page_bytes))
    job = moving.job(DISK, HOST, [3, 10, 5])
    with pytest.raises(LostPages, match="pages \\[10\\] do not hold") as raised:
        moving.transport.send(job).result()
    assert raised.value.pages == (10,)
    moving.transport.cancel(job.id)
    with pytest.raises(ValueError, match="must be a job in flight"):
        moving.transport.write(job.id, np.zeros(3, np.int32))
    good = moving.job(DISK, HOST, [3, 5])
    assert moving.transport.send(good).result().pages == 2


def test_what_cannot_be_moved_is_refused(moving: Moving):
    transport = moving.transport
    assert transport.connects(HOST, DISK) and transport.connects(DISK, HOST)
    assert not transport.connects(HOST, HOST) and not transport.writes_ahead(HOST, DISK)
    with pytest.raises(ValueError, match="target=host/0: must be host/0 and disk/0"):
        transport.send(moving.job(HOST, HOST, [1]))
    named = moving.job(HOST, DISK, [1, 2])
    unnamed = TransferJob(9, HOST, DISK, range(2), named.source_pages, 2)
    with pytest.raises(ValueError, match=r"contents say of pages \[\] .*all of \[1, 2\]"):
        transport.send(unnamed)
    part = TransferJob(9, HOST, DISK, range(1), named.source_pages, 2, contents=named.contents)
    with pytest.raises(ValueError, match="layers are range"):
        transport.send(part)
    transport.send(named)
    with pytest.raises(ValueError, match="a job with this id is in flight"):
        transport.send(named)
    smaller = Rows(HOST, KVLayout.of_heads(1, 1, 8, 4, "float32", 4), moving.host.rows)
    with pytest.raises(ValueError, match=r"store.payload_bytes=512: must be 256, the bytes of a"):
        DiskTransport(smaller, DISK, moving.store, moving.copier)


def test_a_link_is_measured(moving: Moving):
    assert moving.transport.measure(DISK, HOST, 1 << 20).result() > 0
