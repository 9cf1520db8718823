"""The shapes of steps that are timed alone, and how a command line names them."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeCase:
    """`rows` sequences of `context` tokens each, of which all but the newest are in the pool."""

    rows: int
    context: int

    @classmethod
    def parse(cls, text: str) -> "DecodeCase":
        """`64x1060`: rows, context.

        Raises:
          ValueError: anything else.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise ValueError(f"{text!r}: must be ROWSxCONTEXT, such as 64x1060")
        return cls(int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        """As it is parsed."""
        return f"{self.rows}x{self.context}"

    @property
    def tokens(self) -> int:
        """Tokens whose KV is read."""
        return self.rows * self.context


@dataclass(frozen=True)
class PrefillCase:
    """What is packed into one step: of each sequence the tokens computed, and those before them
    that are in the pool already."""

    chunks: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> "PrefillCase":
        """`8x1024`: that many whole prompts of that length; `300+700`: whole prompts of these
        lengths; `2048@6144`: a chunk of the first length over as many earlier tokens as the second.

        Raises:
          ValueError: anything else.
        """
        if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
            return cls(((int(found[2]), 0),) * int(found[1]))
        if re.fullmatch(r"[1-9]\d*(\+[1-9]\d*)+", text):
            return cls(tuple((int(length), 0) for length in text.split("+")))
        if found := re.fullmatch(r"([1-9]\d*)@([1-9]\d*)", text):
            return cls(((int(found[1]), int(found[2])),))
        raise ValueError(f"{text!r}: must be such as 8x1024, 300+700 or 2048@6144")

    @property
    def name(self) -> str:
        """As it is parsed."""
        if len(self.chunks) == 1 and self.chunks[0][1]:
            return "{}@{}".format(*self.chunks[0])
        if self.equal_prompts:
            return f"{len(self.chunks)}x{self.chunks[0][0]}"
        return "+".join(str(length) for length, _ in self.chunks)

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return sum(length for length, _ in self.chunks)

    @property
    def equal_prompts(self) -> bool:
        """Whether all are whole prompts of one length, a rectangle."""
        return len(set(self.chunks)) == 1 and self.chunks[0][1] == 0

    @property
    def pairs(self) -> int:
        """(token, token that it sees), over all sequences."""
        return sum(length * earlier + length * (length + 1) // 2 for length, earlier in self.chunks)

    def pages(self, page_size: int) -> int:
        """Pages that hold everything, earlier tokens included."""
        return sum(-(-(length + earlier) // page_size) for length, earlier in self.chunks)


@dataclass(frozen=True)
class Usual:
    """What is timed where the command line names nothing, as it would name them.

    Attributes:
      paged: paged_attention alone. append: append_attention alone.
      attention: prefill_attention alone.
      decode, prefill: whole steps.
    """

    paged: tuple[str, ...]
    append: tuple[str, ...]
    attention: tuple[str, ...]
    decode: tuple[str, ...]
    prefill: tuple[str, ...]


_PREFILL = ("1x1024", "1x2048", "8x1024", "1x8192", "300+700+1200+1896", "2048@6144")
LARGE = Usual(
    paged=("64x4096", "64x1024", "128x1024", "1x8192"),
    append=("1x1060", "16x1060", "64x1060", "128x1060"),
    attention=_PREFILL,
    decode=("1x1060", "16x1060", "64x1060", "128x1060", "32x8192"),
    prefill=_PREFILL,
)
"""For an accelerator of 80 GB."""

TINY = Usual(
    paged=("4x64",),
    append=("2x40",),
    attention=("2x32", "20@12"),
    decode=("4x40",),
    prefill=("2x32", "5+9", "8@24"),
)
"""For a CPU and the smallest model."""
