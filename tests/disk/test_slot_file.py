"""Slot files that are opened again: what was written is found, whatever else is dropped or
refused."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdjax.core.kv_layout import KVLayout
from pdjax.disk import headers
from pdjax.disk.geometry import Geometry
from pdjax.disk.headers import HEADER, Identity, SlotContent
from pdjax.disk.positional import BLOCK
from pdjax.disk.slot_file import FILE_NAME, SlotFile
from pdjax.disk.superblock import Superblock
from tests.helpers.slots import MINE, PAYLOAD_BYTES, found, key, read, write

NAMES = {slot: f"page {slot}" for slot in (0, 1, 2, 31, 32, 33, 39)}


@pytest.fixture
def folder(open_store, tmp_path: Path) -> Path:
    """A folder with a file of 40 slots, some of which hold pages."""
    store = open_store(tmp_path)
    write(store, NAMES)
    store.close()
    return tmp_path


def edit(folder: Path, offset: int, change: bytes) -> None:
    with open(folder / FILE_NAME, "r+b") as file:
        file.seek(offset)
        file.write(change)


def flip(folder: Path, offset: int) -> None:
    """Flip a bit."""
    [before] = (folder / FILE_NAME).read_bytes()[offset : offset + 1]
    edit(folder, offset, bytes([before ^ 0x20]))


def header_at(slot: int, field: str = "magic") -> int:
    fields = HEADER.fields
    assert fields is not None
    geometry = Geometry(PAYLOAD_BYTES, 40)
    return geometry.headers_at(slot // 32) + slot % 32 * HEADER.itemsize + fields[field][1]


@pytest.mark.parametrize("direct", [True, False])
def test_pages_are_found_again(open_store, tmp_path: Path, monkeypatch, caplog, direct: bool):
    if not direct:
        monkeypatch.setattr(os, "O_DIRECT", 0, raising=False)
    for start in range(2):
        store = open_store(tmp_path)
        if not start:
            write(store, NAMES)
        contents = store.file.contents()
        assert found(store) == {slot: key(name) for slot, name in NAMES.items()}
        assert [each.place for each in contents] == [each.slot for each in contents]
        assert all(read(store, contents)) and not store.file.dropped
        assert store.find(key("page 31")) == 31 and store.find(key("page 30")) is None
        store.close()
    path = tmp_path / FILE_NAME
    assert path.stat().st_size == Geometry(PAYLOAD_BYTES, 40).file_bytes
    assert path.stat().st_blocks * 512 >= path.stat().st_size, "not preallocated"
    assert path.stat().st_mode & 0o077 == 0
    told = [record.message for record in caplog.records if "plain I/O is used" in record.message]
    assert len(told) == (0 if direct else 2)


def test_the_order_of_use_outlives_the_process(open_store, folder: Path):
    store = open_store(folder)
    for slot in (1, 0):
        assert read(store, [SlotContent(slot, key(f"page {slot}"))]) == [True]
    store.close()
    slots = [each.slot for each in open_store(folder).file.contents()]
    assert slots == [39, 33, 32, 31, 2, 1, 0]  # of a batch the end of a sequence first


def test_a_file_grows_and_shrinks_at_its_end(open_store, folder: Path):
    for slots, kept, cut in ((70, 7, 0), (33, 5, 2), (20, 3, 2), (40, 3, 0)):
        store = open_store(folder, slots)
        assert len(found(store)) == kept and all(read(store, store.file.contents()))
        assert store.file.dropped == ({"cut off": cut} if cut else {})
        store.close()
    assert (folder / FILE_NAME).stat().st_size == Geometry(PAYLOAD_BYTES, 40).file_bytes


@pytest.mark.parametrize("field", ["magic", "slot", "key", "generation", "checksum", "crc"])
def test_a_flipped_bit_of_a_header_drops_the_slot(open_store, folder: Path, field: str):
    flip(folder, header_at(31, field))
    store = open_store(folder)
    assert found(store).keys() == NAMES.keys() - {31} and store.file.dropped == {"damaged": 1}
    store.close()
    assert not open_store(folder).file.dropped  # it is gone


def test_a_flipped_bit_of_a_payload_is_never_served(open_store, folder: Path):
    flip(folder, Geometry(PAYLOAD_BYTES, 40).payload_at(32) + PAYLOAD_BYTES - 1)
    store = open_store(folder)
    contents = store.file.contents()
    assert read(store, contents) == [each.slot != 32 for each in contents]
    counters = store.counters()
    assert (counters.corrupt, counters.read, counters.kept) == (1, 6, 6)
    assert store.find(key("page 32")) is None
    store.close()
    assert found(open_store(folder)).keys() == NAMES.keys() - {32}


def test_slots_behind_the_end_of_a_truncated_file_are_dropped(open_store, folder: Path):
    os.truncate(folder / FILE_NAME, Geometry(PAYLOAD_BYTES, 40).payload_at(33) + BLOCK)
    store = open_store(folder)
    assert found(store).keys() == NAMES.keys() - {33, 39}
    assert store.file.dropped == {"truncated": 2}
    assert all(read(store, store.file.contents()))


def test_a_file_that_is_truncated_while_it_is_open_is_not_served(open_store, folder: Path):
    store = open_store(folder)
    contents = store.file.contents()
    os.truncate(folder / FILE_NAME, Geometry(PAYLOAD_BYTES, 40).payload_at(1))
    assert read(store, contents) == [each.slot == 0 for each in contents]
    assert store.counters().corrupt == 6


@pytest.mark.parametrize(
    ("identity", "dropped"),
    [
        (replace(MINE, model=b"another".ljust(16)), {"model": 7}),
        (replace(MINE, layout=b"another".ljust(16)), {"layout": 7}),
        (replace(MINE, payload_bytes=9000), {"layout": 1}),
    ],
)
def test_what_is_of_another_model_or_layout_is_dropped(
    open_store, folder: Path, identity: Identity, dropped: dict[str, int], caplog
):
    store = open_store(folder, identity=identity)
    assert store.file.dropped == dropped == store.counters().dropped and not found(store)
    assert "is dropped" in caplog.text
    write(store, {5: "new"})
    assert read(store, store.file.contents()) == [True]
    store.close()
    back = open_store(folder)
    assert not found(back)


def test_a_file_of_another_format_is_made_anew(open_store, folder: Path):
    edit(folder, 0, Superblock(PAYLOAD_BYTES, 40, version=2).block().tobytes())
    store = open_store(folder)
    assert store.file.dropped == {"version": 1} and not found(store)


def test_slots_outlive_a_damaged_superblock(open_store, folder: Path):
    flip(folder, 24)
    store = open_store(folder)
    assert len(found(store)) == 7 and store.file.dropped == {"superblock": 1}


def test_a_payload_whose_checksum_cannot_be_made_is_dropped(open_store, folder, monkeypatch):
    monkeypatch.setattr(headers, "SUMS", {})
    assert open_store(folder).file.dropped == {"checksum": 7}


def test_of_two_slots_of_one_page_the_later_one_stays(open_store, tmp_path: Path):
    store = open_store(tmp_path)
    for slot in (3, 35, 4):
        write(store, {slot: "a page"})
    store.close()
    store = open_store(tmp_path)
    assert found(store).keys() == {4} and store.file.dropped == {"duplicate": 2}


def test_a_file_that_was_being_made_is_made_again(open_store, folder: Path):
    edit(folder, 0, Superblock(PAYLOAD_BYTES, 0).block().tobytes())
    assert not found(open_store(folder))


@pytest.mark.parametrize("nbytes", [100, Geometry(PAYLOAD_BYTES, 40).file_bytes])
def test_a_file_whose_first_block_was_never_written_is_made_again(
    open_store, tmp_path: Path, nbytes: int
):
    (tmp_path / FILE_NAME).touch()
    os.truncate(tmp_path / FILE_NAME, nbytes)
    store = open_store(tmp_path)
    write(store, NAMES)
    assert not store.file.dropped
    store.close()
    assert len(found(open_store(tmp_path))) == 7


def test_the_superblock_outlives_a_loss_of_power(open_store, tmp_path: Path, monkeypatch):
    kept, fdatasync = list[bytes](), os.fdatasync

    def noted(file: int) -> None:
        fdatasync(file)
        kept.append((tmp_path / FILE_NAME).read_bytes()[:BLOCK])

    monkeypatch.setattr(os, "fdatasync", noted)
    open_store(tmp_path)
    assert kept == [Superblock(PAYLOAD_BYTES, 40).block().tobytes()]


def test_file_and_folder_are_of_this_user_alone(open_store, tmp_path: Path):
    store = open_store(tmp_path / "kv")
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
    store.close()
    path = tmp_path / "kv" / FILE_NAME
    path.chmod(0o666)
    open_store(tmp_path / "kv")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_others_have_put_there_is_refused(open_store, folder: Path, tmp_path, monkeypatch):
    path, own = folder / FILE_NAME, os.geteuid()
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: own + 1)
        with pytest.raises(
            ValueError, match=rf"folder='.*': kv.slots in it is of user {own}; must"
        ):
            open_store(folder)
    other = path.rename(folder / "other")
    path.symlink_to(other)
    with pytest.raises(
        ValueError, match=r"folder='.*': kv.slots in it is a symbolic link; must be"
    ):
        open_store(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(
        ValueError, match=r"folder='.*': kv.slots in it is prw.*; must be a regular"
    ):
        open_store(folder)


def test_a_file_of_others_is_left_alone(open_store, tmp_path: Path):
    (tmp_path / FILE_NAME).write_bytes(b"a file of mine")
    with pytest.raises(ValueError, match=r"folder='.*': kv.slots in it begins with b'a file of m"):
        open_store(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == b"a file of mine"


def test_one_store_has_the_file_at_a_time(open_store, tmp_path: Path):
    first = open_store(tmp_path)
    with pytest.raises(ValueError, match=r"folder='.*': another process, or another store"):
        open_store(tmp_path)
    first.close()
    open_store(tmp_path).close()


def test_a_folder_that_cannot_be_written_is_refused(open_store, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder='.*file/kv': Not a directory; must be a folder"):
        open_store(tmp_path / "file" / "kv")
    if os.path.isdir("/sys/kernel"):
        with pytest.raises(ValueError, match=r"folder='/sys/kernel': .*; must be a folder that"):
            open_store(Path("/sys/kernel"))


def test_a_full_disk_is_refused(open_store, tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match=r"most_bytes=\d+: \d+ bytes more are needed, \d+ are"):
        SlotFile(tmp_path, MINE, 1 << 60)

    def full(file: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        ValueError, match=r"most_bytes=.*: No space left on device; must be at most"
    ):
        open_store(tmp_path)


def test_a_file_without_room_for_a_slot_is_refused(tmp_path: Path):
    assert Geometry.within(PAYLOAD_BYTES, 4 * BLOCK).slots == 1
    with pytest.raises(ValueError, match=f"most_bytes=16383: must be at least {4 * BLOCK}"):
        SlotFile(tmp_path, MINE, 4 * BLOCK - 1)


def test_an_identity_says_what_a_page_is_and_not_how_it_is_dealt_out():
    def identity(page_size: int = 16, dtype: str = "float32", **kwargs: int) -> Identity:
        return Identity.of(bytes(16), KVLayout.of_heads(4, 2, 8, page_size, dtype, 4, **kwargs))

    assert identity() == identity(tp=2) == identity(stages=4)
    assert len({identity(), identity(page_size=8), identity(dtype="int32")}) == 3
    assert identity().payload_bytes == 16 * 4 * 2 * 2 * 8 * 4
    with pytest.raises(ValueError, match="model: 3 bytes; must be 16 bytes"):
        Identity(b"abc", bytes(16), 1)


def test_geometry_has_no_gaps():
    geometry = Geometry(PAYLOAD_BYTES, 70)
    ends = [geometry.payload_at(slot) + geometry.stride for slot in range(70)]
    starts = [geometry.payload_at(slot) for slot in range(1, 70)]
    gaps = np.array(starts) - np.array(ends[:-1])
    assert set(np.flatnonzero(gaps)) == {31, 63} and set(gaps[gaps > 0]) == {BLOCK}
    assert ends[-1] == geometry.file_bytes
    for slots in (0, 1, 31, 32, 33, 70):
        whole = Geometry(PAYLOAD_BYTES, slots)
        assert Geometry.within(PAYLOAD_BYTES, whole.file_bytes).slots == slots
        assert Geometry.within(PAYLOAD_BYTES, whole.file_bytes - 1).slots == max(0, slots - 1)
