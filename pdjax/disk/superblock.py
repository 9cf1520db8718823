"""The first block of a slot file: whose it is, and where its slots lie."""

import struct
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from pdjax.disk.headers import VERSION
from pdjax.disk.positional import BLOCK, ForeignFile, aligned

_MAGIC = b"pdjax KV slots\n\0"
_FIELDS = struct.Struct("<16sIIQQ")
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Superblock:
    """What a slot file says of itself.

    Attributes:
      payload_bytes: of a slot.
      slots: how many there are; 0 while the file is being made.
      version: of the file's format.
      sound: whether the block is as it was written.
    """

    payload_bytes: int
    slots: int
    version: int = VERSION
    sound: bool = True

    def block(self) -> np.ndarray:
        """The block u8[BLOCK], aligned."""
        fields = _FIELDS.pack(_MAGIC, self.version, 0, self.payload_bytes, self.slots)
        whole = fields + _CRC.pack(crc32(fields))
        block = aligned(BLOCK)
        block[: len(whole)] = np.frombuffer(whole, np.uint8)
        return block

    @classmethod
    def read(cls, block: np.ndarray) -> "Superblock":
        """What a block u8[BLOCK] says.

        Raises:
          ForeignFile: it is none of ours.
        """
        fields = block[: _FIELDS.size].tobytes()
        magic, version, _, payload_bytes, slots = _FIELDS.unpack(fields)
        if magic != _MAGIC:
            raise ForeignFile(f"begins with {bytes(magic)!r}; a slot file begins with {_MAGIC!r}")
        [crc] = _CRC.unpack(block[_FIELDS.size :][: _CRC.size].tobytes())
        return cls(payload_bytes, slots, version, crc == crc32(fields))
