"""Stores: what is asked of them, what they count, and disks that fail."""

import shutil
import threading

import numpy as np
import pytest

from pdjax.core.clock import VirtualClock
from pdjax.disk.headers import SlotContent
from pdjax.disk.positional import read_at, write_at
from pdjax.disk.work import DiskBusy, DiskClosed
from tests.helpers.slots import PAYLOAD_BYTES, found, key, payload, read, write

WRITE_AT = "pdjax.disk.slot_file.write_at"


def test_pages_go_through_buffers_of_either_kind(open_store, tmp_path):
    """Rows of aligned buffers go to the disk as they are, others through the threads' own."""
    store = open_store(tmp_path, part_bytes=3 * 8192)
    contents = [SlotContent(slot, key(slot)) for slot in (39, 0, 7, 8, 9, 30, 31, 32)]
    rows = store.buffers(len(contents))
    assert rows.shape == (8, 8192)
    for row, each in zip(rows, contents, strict=True):
        row[:PAYLOAD_BYTES], row[PAYLOAD_BYTES:] = payload(each.key), 0xFF
    assert store.write(contents, rows).result() == 8
    rows[:] = 0
    assert store.read(contents, rows).result() == (True,) * 8
    for row, each in zip(rows, contents, strict=True):
        assert (row[:PAYLOAD_BYTES] == payload(each.key)).all()
    assert read(store, contents) == [True] * 8


def test_what_is_counted(open_store, tmp_path):
    clock = VirtualClock()
    store = open_store(tmp_path, clock=clock)
    write(store, {0: "a", 1: "b"})
    write(store, {1: "c"})
    contents = [SlotContent(0, key("a")), SlotContent(1, key("b")), SlotContent(2, key("d"))]
    assert read(store, contents) == [True, False, False]
    assert store.find(key("b")) is None and store.find(key("c")) == 1
    assert store.drop([0, 5]).result() == 2
    counters = store.counters()
    assert counters.slots == 40 and counters.kept == 1 and counters.busy_bytes == 0
    assert (counters.written, counters.written_bytes) == (3, 3 * PAYLOAD_BYTES)
    assert (counters.read, counters.read_bytes) == (1, PAYLOAD_BYTES)
    assert (counters.evicted, counters.missed, counters.corrupt, counters.failed) == (1, 2, 0, 0)
    assert counters.read_seconds == counters.write_seconds == 0 == clock.now()
    store.close()
    assert found(open_store(tmp_path)) == {1: key("c")}


@pytest.mark.parametrize(
    ("contents", "pages", "match"),
    [
        ([SlotContent(1, bytes(16)), SlotContent(1, bytes(16))], 2, r"slots=\[1, 1\]: must differ"),
        ([SlotContent(40, bytes(16))], 1, r"slot=40: must be in \[0, 40\)"),
        ([SlotContent(-1, bytes(16))], 1, r"slot=-1: must be in \[0, 40\)"),
        ([SlotContent(1, b"short")], 1, r"key=b'short': must be 16 bytes"),
    ],
)
def test_what_cannot_be_written_is_refused(open_store, tmp_path, contents, pages, match):
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match=match):
        store.write(contents, np.zeros((pages, PAYLOAD_BYTES), np.uint8))
    with pytest.raises(
        ValueError, match=r"payload: uint8\[5999\]; must be uint8\[6000\], or a row"
    ):
        store.read([SlotContent(0, bytes(16))], np.zeros((1, 5999), np.uint8))
    assert not found(store)


class Gate:
    """Holds up what threads write until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()

        def held(file, buffers, offset) -> None:
            self.reached.set()
            assert self.open.wait(10)
            write_at(file, buffers, offset)

        monkeypatch.setattr(WRITE_AT, held)


def test_a_slot_is_read_and_written_in_the_order_of_the_calls(open_store, tmp_path, monkeypatch):
    store = open_store(tmp_path)
    write(store, {0: "a"})
    gate = Gate(monkeypatch)
    page = payload(key("b"))[None]
    second = store.write([SlotContent(0, key("b"))], page)
    target = np.zeros_like(page)
    late = store.read([SlotContent(0, key("b"))], target)
    assert store.find(key("b")) is None and not second.ready() and not late.ready()
    gate.open.set()
    assert late.result() == (True,) and second.ready()
    assert (target == page).all()


def test_reads_go_before_writes_of_other_slots(open_store, tmp_path, monkeypatch):
    store = open_store(tmp_path, threads=1)
    write(store, {0: "a"})
    gate = Gate(monkeypatch)
    order = list[str]()
    pages = [payload(key("b"))]
    store.write([SlotContent(1, key("b"))], pages)
    assert gate.reached.wait(10)  # the thread is busy from now on
    written = store.write([SlotContent(2, key("c"))], [payload(key("c"))])
    came = store.read([SlotContent(0, key("a"))], np.zeros((1, PAYLOAD_BYTES), np.uint8))
    for name, ticket in (("write", written), ("read", came)):

        def done(error, name=name, part_done=ticket.part_done) -> None:
            order.append(name)
            part_done(error)

        monkeypatch.setattr(ticket, "part_done", done)
    gate.open.set()
    assert came.result() == (True,) and written.result() == 1
    assert order == ["read", "write"]


def test_what_is_in_flight_is_bounded(open_store, tmp_path, monkeypatch):
    store = open_store(tmp_path, threads=1, most_bytes=2 * PAYLOAD_BYTES)
    gate = Gate(monkeypatch)
    pages = [payload(key(slot)) for slot in range(4)]
    contents = [SlotContent(slot, key(slot)) for slot in range(4)]
    first = store.write(contents[:1], pages[:1])
    with pytest.raises(DiskBusy, match=r"6000 bytes are in flight, and 12000 more .* most 12000"):
        store.write(contents[1:3], pages[1:3])
    second = store.write(contents[1:2], pages[1:2])
    assert store.counters().busy_bytes == 2 * PAYLOAD_BYTES
    gate.open.set()
    assert first.result() == second.result() == 1
    assert store.write(contents, pages).result() == 4  # alone it may be larger
    assert store.counters().busy_bytes == 0


def test_a_closed_store_drops_what_waits(open_store, tmp_path, monkeypatch):
    store = open_store(tmp_path, threads=1)
    gate = Gate(monkeypatch)
    tickets = [
        store.write([SlotContent(slot, key(slot))], [payload(key(slot))]) for slot in range(2)
    ]
    assert gate.reached.wait(10)
    closing = threading.Thread(target=store.close)
    closing.start()
    with pytest.raises(DiskClosed, match="closed before this was done"):
        tickets[1].result()
    gate.open.set()
    closing.join()
    assert tickets[0].result() == 1
    with pytest.raises(DiskClosed, match="the store is closed"):
        store.drop([0])
    store.close()
    monkeypatch.undo()
    assert found(open_store(tmp_path)) == {0: key(0)}


@pytest.mark.parametrize("fails_at", range(3))
def test_a_write_that_fails_leaves_nothing_to_be_found(open_store, tmp_path, monkeypatch, fails_at):
    """It fails at the old header, the payload or the new header; and what is written later to the
    same slot is not taken for it."""
    store = open_store(tmp_path)
    write(store, {0: "a", 1: "b"})
    calls = iter(range(100))

    def failing(file, buffers, offset) -> None:
        if next(calls) == fails_at:
            raise OSError(5, "Input/output error")
        write_at(file, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(WRITE_AT, failing)
        with pytest.raises(OSError, match="Input/output error"):
            write(store, {0: "c"})
    assert store.find(key("a")) is None and store.find(key("c")) is None
    assert found(store) == {1: key("b")} and store.counters().failed == 1
    payload_at = store.file.geometry.payload_at(0)

    def ends_after_the_payload(file, buffers, offset) -> None:
        write_at(file, buffers, offset)
        if offset == payload_at:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(WRITE_AT, ends_after_the_payload)
        with pytest.raises(OSError, match="Input/output error"):
            write(store, {0: "d"})
    (tmp_path / "copy").mkdir()
    shutil.copy(store.file.path, tmp_path / "copy")
    assert found(open_store(tmp_path / "copy")) == {1: key("b")}


def test_of_old_headers_that_cannot_be_cleared_none_is_found(open_store, tmp_path, monkeypatch):
    """Nor those of later groups, whose blocks were not written."""
    store = open_store(tmp_path, 100)
    write(store, {31: "a", 32: "b", 64: "c", 65: "d"})

    def failing(file, buffers, offset) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(WRITE_AT, failing)
        with pytest.raises(OSError, match="Input/output error"):
            write(store, {31: "e", 32: "f", 64: "g"})
    assert found(store) == {65: key("d")}


def test_a_page_that_cannot_be_read_is_dropped(open_store, tmp_path, monkeypatch):
    store = open_store(tmp_path)
    write(store, {slot: slot for slot in range(3)})
    bad = store.file.geometry.payload_at(1)

    def failing(file, buffers, offset) -> int:
        if offset <= bad < offset + sum(buffer.nbytes for buffer in buffers):
            raise OSError(5, "Input/output error")
        return read_at(file, buffers, offset)

    monkeypatch.setattr("pdjax.disk.slot_file.read_at", failing)
    assert read(store, store.file.contents()) == [True, False, True]
    assert store.counters().corrupt == 1 and found(store).keys() == {0, 2}
