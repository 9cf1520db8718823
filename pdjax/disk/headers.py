"""The headers of slots: what lies in each, and how to know that it does."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple
from zlib import crc32

import numpy as np

from pdjax.core.kv_layout import KVLayout
from pdjax.disk.checksum import FASTEST, SUMS
from pdjax.disk.positional import BLOCK, aligned

VERSION = 1
"""Of the format of slot files. Another one is not read."""

KEY_BYTES = 16
"""Bytes of a key: the chained hash of a page; see `host/kv/prefix_index.py`."""

ID_BYTES = 16
"""Bytes of the name of a model and of the digest of a layout."""

_MAGIC = 0x4B56_5044  # "DPVK" in a file
_ID = ("u1", (ID_BYTES,))

HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u4"),
        ("slot", "<u8"),
        ("model", *_ID),
        ("layout", *_ID),
        ("key", "u1", (KEY_BYTES,)),
        ("place", "<u8"),
        ("generation", "<u8"),
        ("used", "<u8"),
        ("length", "<u8"),
        ("checksum", "<u8"),
        ("summed", "<u4"),
        ("unused", "u1", (16,)),
        ("crc", "<u4"),
    ]
)
"""A header. `place` is that of the page in its sequence; `generation` counts writes and uses of the
file, up to the one that wrote the slot, and `used` up to the last use of the slot; `length` and
`checksum` are of the payload, `summed` says by which of `checksum.SUMS`, and `crc` is of all fields
before it. An empty slot has zeros."""

HEADERS_PER_BLOCK = BLOCK // HEADER.itemsize
_CRC_AT = HEADER.itemsize - 4


@dataclass(frozen=True)
class Identity:
    """Whose KV lies in a slot.

    Attributes:
      model: name of the weights and of whatever else KV follows from, ID_BYTES.
      layout: digest of the layout of a page, ID_BYTES.
      payload_bytes: of a page.
    """

    model: bytes
    layout: bytes
    payload_bytes: int

    def __post_init__(self) -> None:
        for name in ("model", "layout"):
            if len(getattr(self, name)) != ID_BYTES:
                raise ValueError(
                    f"{name}: {len(getattr(self, name))} bytes; must be {ID_BYTES} bytes"
                )
        if self.payload_bytes < 1:
            raise ValueError(f"payload_bytes={self.payload_bytes}: must be at least 1")

    @classmethod
    def of(cls, model: bytes, layout: KVLayout) -> "Identity":
        """That of a model's pages. How a mesh deals layers and heads out does not matter: a payload
        has all of them, in their global order."""
        kind = repr((layout.planes, layout.page_size, layout.dtype, layout.itemsize))
        digest = blake2b(kind.encode(), digest_size=ID_BYTES).digest()
        return cls(model, digest, layout.page_bytes)


class SlotContent(NamedTuple):
    """What lies in a slot, or is to.

    Attributes:
      slot: its number, from 0 on.
      key: of the page.
      place: of the page among those of its sequence, of which the first has 0.
    """

    slot: int
    key: bytes
    place: int = 0


class Headers:
    """The headers of a file, in memory as they are to be on the disk: whole blocks, aligned for
    direct I/O. A file's lock guards each block; see `SlotFile`.

    Args:
      identity: of every slot that is set here.
      groups: blocks of headers.

    Attributes:
      table: HEADER[slots], to be read only.
      blocks: the same as u8[groups, BLOCK].
    """

    def __init__(self, identity: Identity, groups: int) -> None:
        self.identity = identity
        self._hold(aligned(groups * BLOCK).reshape(groups, BLOCK))

    def _hold(self, blocks: np.ndarray) -> None:
        self.blocks = blocks
        self.table = blocks.reshape(-1).view(HEADER)

    def cut(self, groups: int) -> None:
        """Forget all but the first blocks, if there are more."""
        if groups < len(self.blocks):
            kept = aligned(groups * BLOCK).reshape(groups, BLOCK)
            kept[:] = self.blocks[:groups]
            self._hold(kept)

    def is_empty(self, slot: int) -> bool:
        """Whether nothing lies in a slot."""
        return not self.table["magic"][slot]

    def content(self, slot: int) -> SlotContent:
        """What lies in a slot that is not empty."""
        [content] = self.contents(np.array([slot]))
        return content

    def contents(self, slots: np.ndarray) -> list[SlotContent]:
        """What lies in slots i64[n] that are not empty."""
        keys, places = self.table["key"][slots].tobytes(), self.table["place"][slots].tolist()
        ends = range(KEY_BYTES, len(keys) + 1, KEY_BYTES)
        split = (keys[end - KEY_BYTES : end] for end in ends)
        return list(map(SlotContent, slots.tolist(), split, places))

    def clear(self, slot: int) -> None:
        """Let a slot be empty."""
        self.table[slot] = np.zeros((), HEADER)

    def set(self, content: SlotContent, generation: int, checksum: int) -> None:
        """Say what lies in a slot; the checksum is that of `FASTEST`."""
        header = self.table[content.slot : content.slot + 1]
        header["magic"], header["version"], header["slot"] = _MAGIC, VERSION, content.slot
        header["model"] = np.frombuffer(self.identity.model, np.uint8)
        header["layout"] = np.frombuffer(self.identity.layout, np.uint8)
        header["key"] = np.frombuffer(content.key, np.uint8)
        header["place"], header["length"] = content.place, self.identity.payload_bytes
        header["generation"] = header["used"] = generation
        header["checksum"], header["summed"] = checksum, FASTEST
        self._sign(content.slot)

    def holds(self, slot: int, payload: np.ndarray) -> bool:
        """Whether a payload is the one that was written to a slot."""
        header = self.table[slot]
        return SUMS[int(header["summed"])](payload) == int(header["checksum"])

    def use(self, slot: int, generation: int) -> None:
        """Note a use of what lies in a slot."""
        self.table["used"][slot] = generation
        self._sign(slot)

    def _sign(self, slot: int) -> None:
        header = memoryview(self.table[slot : slot + 1].view(np.uint8))
        self.table["crc"][slot] = crc32(header[:_CRC_AT])

    def flaws(self, slots: int, whole: int) -> dict[str, np.ndarray]:
        """The slots whose headers are not to be believed, i64[n] by what is wrong with them.

        Args:
          slots: of the file.
          whole: so many of them, the first ones, have payloads that lie within the file.
        """
        table, mine = self.table, self.identity
        used = np.flatnonzero(self.blocks.reshape(-1, HEADER.itemsize).any(axis=1))
        found: dict[str, np.ndarray] = {}
        for what, right in (
            ("damaged", self._signed(used) & (table["slot"][used] == used)),
            ("version", table["version"][used] == VERSION),
            ("checksum", np.isin(table["summed"][used], list(SUMS))),
            ("layout", _same(table["layout"][used], mine.layout)),
            ("model", _same(table["model"][used], mine.model)),
            ("cut off", used < slots),
            ("truncated", used < whole),
        ):
            wrong = np.zeros(len(table), bool)
            wrong[used] = ~right
            for others in found.values():
                wrong[others] = False
            found[what] = np.flatnonzero(wrong)
        flawed = np.concatenate(list(found.values()))
        found["duplicate"] = self._duplicates(np.setdiff1d(used, flawed, assume_unique=True))
        return {what: wrong for what, wrong in found.items() if len(wrong)}

    def _signed(self, slots: np.ndarray) -> np.ndarray:
        """bool[n]: whether the headers of some slots are as they were set."""
        bits, size = memoryview(self.blocks.reshape(-1)), HEADER.itemsize
        sums = (crc32(bits[at : at + _CRC_AT]) for at in (slots * size).tolist())
        crcs = np.fromiter(sums, np.uint32, len(slots))
        signed: np.ndarray = (self.table["crc"][slots] == crcs) & (
            self.table["magic"][slots] == _MAGIC
        )
        return signed

    def _duplicates(self, slots: np.ndarray) -> np.ndarray:
        """Those of some slots whose key another one of them has that was written later."""
        latest_first = slots[np.argsort(self.table["generation"][slots])[::-1]]
        keys = np.ascontiguousarray(self.table["key"][latest_first]).view("<u8")
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # is stable
        same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
        return latest_first[order[1:][same]]


def _same(ids: np.ndarray, expected: bytes) -> np.ndarray:
    """bool[n]: whether each of ids u8[n, ID_BYTES] is the expected one."""
    result: np.ndarray = (ids == np.frombuffer(expected, np.uint8)).all(axis=1)
    return result
