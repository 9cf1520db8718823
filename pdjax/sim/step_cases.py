"""The shapes of steps that are timed alone, and their names on command lines and in results."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeCase:
    """`rows` sequences of `context` tokens; the pool holds all but the newest token of each. The
    engine has `of` rows, others of which are idle."""

    rows: int
    context: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "DecodeCase":
        """Parse `64x1060` (rows, context) or `8of64x1060` (active rows, all rows, context).

        Raises:
          ValueError: anything else, or fewer rows than active ones.
        """
        found = re.fullmatch(r"([1-9]\d*)(?:of([1-9]\d*))?x([1-9]\d*)", text)
        if found is None:
            raise ValueError(
                f"{text!r}: must be ROWSxCONTEXT or ACTIVEofROWSxCONTEXT, such as 64x1060"
            )
        rows, of = int(found[1]), int(found[2] or found[1])
        if rows > of:
            raise ValueError(f"{text!r}: at most {of} of {of} rows are active")
        return cls(rows, int(found[3]), of)

    @property
    def name(self) -> str:
        """As it is parsed."""
        rows = f"{self.rows}of{self.of}" if self.of > self.rows else f"{self.rows}"
        return f"{rows}x{self.context}"

    @property
    def tokens(self) -> int:
        """Number of tokens with KV that is read."""
        return self.rows * self.context


@dataclass(frozen=True)
class PrefillCase:
    """The chunks packed into one step: for each sequence the computed tokens, and the earlier ones
    that are already in the pool."""

    chunks: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> "PrefillCase":
        """Parse `8x1024` (8 whole prompts of 1,024 tokens), `300+700` (whole prompts of these
        lengths) or `2048@6144` (a chunk of 2,048 tokens over 6,144 earlier ones).

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
        """Number of computed tokens."""
        return sum(length for length, _ in self.chunks)

    @property
    def equal_prompts(self) -> bool:
        """Whether all chunks are whole prompts of one length, a rectangle."""
        return len(set(self.chunks)) == 1 and self.chunks[0][1] == 0

    @property
    def pairs(self) -> int:
        """Number of pairs (token, token that it sees) over all sequences."""
        return sum(length * earlier + length * (length + 1) // 2 for length, earlier in self.chunks)

    def pages(self, page_size: int) -> int:
        """Return the number of pages for all tokens, earlier ones included."""
        return sum(-(-(length + earlier) // page_size) for length, earlier in self.chunks)


@dataclass(frozen=True)
class MixedCase:
    """Rows that decode and chunks of prompts, in one step."""

    rows: DecodeCase
    chunks: PrefillCase

    @classmethod
    def parse(cls, text: str) -> "MixedCase":
        """Parse `64x1060/1x512`: a decode case, and a prefill case of whole prompts or of one
        chunk.

        Raises:
          ValueError: anything else.
        """
        rows, slash, chunks = text.partition("/")
        if not slash:
            raise ValueError(f"{text!r}: must be ROWS/CHUNKS, such as 64x1060/1x512")
        return cls(DecodeCase.parse(rows), PrefillCase.parse(chunks))

    @property
    def name(self) -> str:
        """As it is parsed."""
        return f"{self.rows.name}/{self.chunks.name}"
