"""How a launch of decode attention is cut on Hopper GPUs into pieces of work, and how many
warpgroups compute each. By shape alone, since it shows in the bits of a result.
"""

from dataclasses import dataclass, replace

import jax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import PROCESSORS
from pallas_kernels.quantised import Pages, QuantisedPages, elements_of

BLOCK = 64
"""Tokens of a stage of the rings."""

REDUCTION_BYTES = 2048
"""Shared memory through which Mosaic may reduce across warps."""

_RING_BYTES = 160 << 10
# Over quantised pages, of what `scaled_stages` counts; the rest of the 227 KB is for barriers,
# angles, numbers, reductions, and the alignment of all of them.
_SCALED_BYTES = 216 << 10

# In the time that a block of 64 tokens takes where every processor reads, 1.5 us on an H100 at head
# dim 128: to begin and end a piece of work, and to put parts together. Estimates from profiles of a
# few shapes; other numbers of parts have not been timed beside those that they choose.
_PIECE_COST = 1.5
_JOIN_COST = 2.0
_MOST_PARTS = 32

_FEWEST_STAGES = 2  # of the rings, for which two readers may leave no room

# Where rows are cut by their own length: blocks of one that is not, of a part of any other, and
# parts of a row that fills the page table, since there is room for as many of each, and all are put
# together at once.
_WHOLE = 64
_PART = 32
_MOST_OF_A_LONG_ROW = 16


@dataclass(frozen=True)
class ByLength:
    """How a row of so many blocks is cut.

    Attributes:
      whole: blocks of a row that is not, at most.
      part: blocks of a part of any other, at most.
    """

    whole: int
    part: int

    def parts(self, blocks: int) -> int:
        return 1 if blocks <= self.whole else -(-blocks // self.part)


def scaled_stages(head_dim: int, queries: int, slots: int, append: bool, readers: int = 1) -> int:
    """Of rings over quantised pages, for which there is room; it takes two."""
    # Rows of pieces of work, each reader's two tiles, new elements; queries, weights, results and
    # what goes from one reader to the other beside them.
    fixed = (2 * slots + 4 * readers + 2 * append) * BLOCK * head_dim
    fixed += queries * ((2 + 4 * readers) * head_dim + 2 * BLOCK * readers)
    return (_SCALED_BYTES - fixed) // (2 * BLOCK * (head_dim + 4))


@dataclass(frozen=True)
class Plan:
    """What is known of a launch before it is traced."""

    rows: int
    kv_heads: int
    group: int
    head_dim: int
    width: int  # entries of a row of the page table
    page_size: int
    parts: int  # pieces of work that share a row and a KV head; with `by_length`, at most
    by_length: ByLength | None  # where each row has a number of its own
    programs: int
    readers: int  # warpgroups of a program that compute
    append: bool
    scaled: bool  # whether pages are int8 with scales
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None
    weights_in_registers: bool = True
    """As they should be; Pallas' interpreter takes them from shared memory alone. Over quantised
    pages they are the other operand, which never is in registers."""

    @property
    def stages(self) -> int:
        """Of the rings; a stage holds a block of K and of V."""
        if not self.scaled:
            return max(2, min(8, _RING_BYTES // (4 * BLOCK * self.head_dim)))
        room = scaled_stages(self.head_dim, self.queries, self.slots, self.append, self.readers)
        return min(8, room)

    @property
    def queries(self) -> int:
        """Of a KV head, as columns of a product."""
        return self.group + -self.group % 8

    @property
    def slots(self) -> int:
        """For the queries of a piece of work, so that the next one's are there when it begins."""
        return 1 if self.head_dim > 128 or (self.parts > 1 and self.by_length is None) else 2

    @property
    def out_columns(self) -> int:
        """Of a float32 result on its way out: shared memory is full of pages."""
        return 64 if self.slots == 1 else 32

    @property
    def loaded(self) -> int:
        """Rows that come in for a KV head: its queries, and with `append` its new K and V."""
        return self.group + 2 * self.append

    @property
    def padding(self) -> int:
        """Queries that make a copy of a float32 for each a multiple of 16 bytes; over quantised
        pages, all columns of a product."""
        return self.queries - self.group if self.scaled else -self.group % 4

    @property
    def part_shape(self) -> tuple[int, int]:
        """Of a part's result: [G, H], or over quantised pages [H, Q]."""
        if self.scaled:
            return self.head_dim, self.queries
        return self.group, self.head_dim

    @property
    def capacity(self) -> int:
        """Parts of all rows together, at most."""
        return self.rows * self.parts


def make_plan(
    loaded: jax.Array,
    k_pages: Pages,
    page_table: jax.Array,
    *,
    append: bool,
    scale: float,
    logit_soft_cap: float | None,
    sliding_window: int | None,
    weights_in_registers: bool = True,
    parts: int | ByLength | None = None,
    programs: int = PROCESSORS,
    readers: int | None = None,
) -> Plan:
    """The plan of a launch.

    Args:
      loaded: [B, K, G, H] queries, with `append` [B, K, G + 2, H].
      k_pages, page_table, append, scale, logit_soft_cap, sliding_window: as in the operations.
      weights_in_registers: see `Plan`.
      parts: pieces of work that share a row and a KV head; None chooses.
      programs: blocks of threads, at most.
      readers: warpgroups of a program that compute, 1 or 2; None chooses: over quantised pages two,
        of which one converts while the other waits, where there is room for both.

    Raises:
      ValueError: two readers of other pages or where there is no room, or another number of them.
    """
    rows, kv_heads, loaded_rows, head_dim = loaded.shape
    page_size, width = elements_of(k_pages).shape[2], page_table.shape[1]
    pieces, tokens = rows * kv_heads, width * page_size
    scaled = isinstance(k_pages, QuantisedPages)
    if parts is None and scaled:  # its results leave whole or in parts, not some of them so
        parts = even_parts(pieces, pl.cdiv(tokens, BLOCK), programs)
    parts = parts or choose_parts(pieces, tokens, sliding_window, programs)
    if isinstance(parts, ByLength):
        most = parts.parts(visible_blocks(tokens, sliding_window))
        by_length = parts if most > 1 else None
    else:
        most, by_length = parts, None
    plan = Plan(
        rows=rows,
        kv_heads=kv_heads,
        group=loaded_rows - 2 * append,
        head_dim=head_dim,
        width=width,
        page_size=page_size,
        parts=most,
        by_length=by_length,
        programs=min(programs, pieces * (1 if by_length else most)),
        readers=1,
        weights_in_registers=weights_in_registers,
        append=append,
        scaled=scaled,
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
    )
    two = replace(plan, readers=2)
    choices = (2, 1) if scaled and two.stages >= _FEWEST_STAGES else (1,)
    readers = choices[0] if readers is None else readers
    if readers not in choices:
        raise ValueError(
            f"readers={readers}: must be 1, or over quantised pages 2 where there is room for both"
        )
    return two if readers == 2 else plan


def visible_blocks(tokens: int, sliding_window: int | None) -> int:
    """Of a row that fills its page table, at most."""
    blocks = pl.cdiv(tokens, BLOCK)
    return blocks if sliding_window is None else min(blocks, pl.cdiv(sliding_window, BLOCK) + 1)


def choose_parts(
    pieces: int, tokens: int, sliding_window: int | None, programs: int
) -> int | ByLength:
    """Into how many parts rows are cut: by length where one can be long and whole ones are work
    enough for all programs, or nearly so.

    Args:
      pieces: rows * KV heads.
      tokens: of a row that fills its page table.
    """
    parts = even_parts(pieces, pl.cdiv(tokens, BLOCK), programs)
    visible = visible_blocks(tokens, sliding_window)
    if (parts > 1 and pieces < programs) or visible <= _WHOLE:
        return parts
    return ByLength(_WHOLE, max(_PART, pl.cdiv(visible, _MOST_OF_A_LONG_ROW)))


def even_parts(pieces: int, blocks: int, programs: int) -> int:
    """Into how many parts to cut each of so many pieces of work of so many blocks: those with which
    the busiest program is done first."""

    def time(parts: int) -> float:
        turns = pl.cdiv(pieces * parts, programs)
        return turns * (pl.cdiv(blocks, parts) + _PIECE_COST) + (parts > 1) * _JOIN_COST

    return min(range(1, min(blocks, _MOST_PARTS) + 1), key=time)
