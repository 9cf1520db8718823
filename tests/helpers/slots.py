"""Slot files whose payloads follow from their keys, so that any of them can be checked."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from pdjax.disk.geometry import Geometry
from pdjax.disk.headers import Identity, SlotContent
from pdjax.disk.slot_file import SlotFile
from pdjax.disk.slot_store import SlotStore

PAYLOAD_BYTES = 6000
"""Not a multiple of a block."""

MINE = Identity(b"a model".ljust(16), b"a layout".ljust(16), PAYLOAD_BYTES)


def key(name: object) -> bytes:
    return blake2b(repr(name).encode(), digest_size=16).digest()


def payload(key: bytes, nbytes: int = PAYLOAD_BYTES) -> np.ndarray:
    """u8[nbytes] of a page of this key."""
    start = int.from_bytes(key[:8], "little")
    words = np.arange(-(-nbytes // 8), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (words ^ np.uint64(start)).view(np.uint8)[:nbytes]


def new_store(folder: Path, slots: int = 40, identity: Identity = MINE, **kwargs) -> SlotStore:
    geometry = Geometry(identity.payload_bytes, slots)
    return SlotStore(SlotFile(folder, identity, geometry.file_bytes), **kwargs)


def write(store: SlotStore, names: Mapping[int, object]) -> None:
    """Write a page of each name into its slot."""
    contents = [SlotContent(slot, key(name), slot) for slot, name in names.items()]
    pages = [payload(each.key, store.payload_bytes) for each in contents]
    assert store.write(contents, pages).result() == len(names)


def read(store: SlotStore, contents: Sequence[SlotContent]) -> list[bool]:
    """Read pages; asserts that each that came is the one of its key."""
    pages = np.zeros((len(contents), store.payload_bytes), np.uint8)
    came = store.read(contents, pages).result()
    for each, page, here in zip(contents, pages, came, strict=True):
        assert not here or (page == payload(each.key, store.payload_bytes)).all(), each
    return list(came)


def found(store: SlotStore) -> dict[int, bytes]:
    """The key of what lies in each slot."""
    return {each.slot: each.key for each in store.file.contents()}
