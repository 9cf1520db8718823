"""Where things lie in a slot file."""

from dataclasses import dataclass

from pdjax.disk.headers import HEADERS_PER_BLOCK
from pdjax.disk.positional import BLOCK


@dataclass(frozen=True)
class Geometry:
    """Slots of one size, in groups behind a superblock.

        superblock | headers of 32 slots | 32 payloads | headers of 32 slots | 32 payloads | ...

    The headers of a group fill one block, so that a start reads a 32nd of the blocks that headers
    beside their payloads would take, and a batch of neighbouring slots writes its headers at once.
    A group is a unit: a file grows and shrinks at its end, and nothing moves.

    Attributes:
      payload_bytes: of a slot.
      slots: how many there are; the last group may have fewer than the others.
    """

    payload_bytes: int
    slots: int

    @classmethod
    def within(cls, payload_bytes: int, most_bytes: int) -> "Geometry":
        """As many slots as a file of `most_bytes` has room for; maybe none."""
        whole, rest = divmod(most_bytes - BLOCK, cls(payload_bytes, 0).group_bytes)
        last = max(0, rest - BLOCK) // padded(payload_bytes)
        return cls(payload_bytes, max(0, whole * HEADERS_PER_BLOCK + last))

    @property
    def stride(self) -> int:
        """Bytes from one payload of a group to the next: whole blocks."""
        return padded(self.payload_bytes)

    @property
    def group_bytes(self) -> int:
        """Bytes of a whole group."""
        return BLOCK + HEADERS_PER_BLOCK * self.stride

    @property
    def groups(self) -> int:
        """How many there are."""
        return -(-self.slots // HEADERS_PER_BLOCK)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        whole, rest = divmod(self.slots, HEADERS_PER_BLOCK)
        return BLOCK + whole * self.group_bytes + (BLOCK + rest * self.stride if rest else 0)

    def headers_at(self, group: int) -> int:
        """Where the block of headers of a group begins, in bytes."""
        return BLOCK + group * self.group_bytes

    def payload_at(self, slot: int) -> int:
        """Where the payload of a slot begins, in bytes."""
        group, place = divmod(slot, HEADERS_PER_BLOCK)
        return self.headers_at(group) + BLOCK + place * self.stride


def padded(nbytes: int) -> int:
    """Bytes of the whole blocks that hold so many."""
    return -(-nbytes // BLOCK) * BLOCK
