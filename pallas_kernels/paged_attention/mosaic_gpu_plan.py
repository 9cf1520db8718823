"""Plans how a launch of decode attention on Hopper GPUs is cut into pieces of work, and how many
warpgroups compute each. The plan depends on shapes alone, since it affects a result's bits.
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
# Shared memory for all that `scaled_stages` counts, over quantised pages. The rest of the 227 KB is
# for barriers, angles, numbers, reductions, and the alignment of all of them.
_SCALED_BYTES = 216 << 10

# Costs of beginning and ending a piece of work, and of combining parts. The unit is the time of a
# block of 64 tokens where every processor reads: 1.5 us on an H100 at head dim 128. They are
# estimates from profiles of a few shapes; only the numbers of parts that they choose were timed.
_PIECE_COST = 1.5
_JOIN_COST = 2.0
_MOST_PARTS = 32

_FEWEST_STAGES = 2  # fewest stages of the rings, for which two readers may leave no room

# Where rows are cut by their own length: most blocks of a row that is not cut, most blocks of a
# part, and most parts of a row that fills the page table. Every row has room for that many parts,
# and all are combined at once.
_WHOLE = 64
_PART = 32
_MOST_OF_A_LONG_ROW = 16


@dataclass(frozen=True)
class ByLength:
    """The rule that cuts a row by its number of blocks.

    Attributes:
      whole: most blocks of a row that is not cut.
      part: most blocks of a part of a longer row.
    """

    whole: int
    part: int

    def parts(self, blocks: int) -> int:
        return 1 if blocks <= self.whole else -(-blocks // self.part)


def scaled_stages(head_dim: int, queries: int, slots: int, append: bool, readers: int = 1) -> int:
    """Number of stages of rings over quantised pages that fit; the kernel needs two."""
    # First: rows of pieces of work, each reader's two tiles, new elements. Second: queries,
    # weights, results, and the state that one reader passes to the other.
    fixed = (2 * slots + 4 * readers + 2 * append) * BLOCK * head_dim
    fixed += queries * ((2 + 4 * readers) * head_dim + 2 * BLOCK * readers)
    return (_SCALED_BYTES - fixed) // (2 * BLOCK * (head_dim + 4))


@dataclass(frozen=True)
class Plan:
    """The static parameters of a launch."""

    rows: int
    kv_heads: int
    group: int
    head_dim: int
    width: int  # entries of a row of the page table
    page_size: int
    parts: int  # pieces of work that share a row and a KV head; with `by_length`, the most
    by_length: ByLength | None  # cuts each row by its own length; None cuts all alike
    programs: int
    readers: int  # warpgroups of a program that compute
    append: bool
    scaled: bool  # whether pages are int8 with scales
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None
    weights_in_registers: bool = True
    """Whether weights stay in registers; Pallas' interpreter takes them from shared memory. Over
    quantised pages they are the right operand, which is always in shared memory."""

    @property
    def stages(self) -> int:
        """Number of stages of the rings; a stage holds a block of K and of V."""
        if not self.scaled:
            return max(2, min(8, _RING_BYTES // (4 * BLOCK * self.head_dim)))
        room = scaled_stages(self.head_dim, self.queries, self.slots, self.append, self.readers)
        return min(8, room)

    @property
    def queries(self) -> int:
        """Queries of a KV head as columns of a product: a multiple of 8."""
        return self.group + -self.group % 8

    @property
    def slots(self) -> int:
        """Slots for the rows of a piece of work; with two, the next piece's rows load early."""
        return 1 if self.head_dim > 128 or (self.parts > 1 and self.by_length is None) else 2

    @property
    def out_columns(self) -> int:
        """Columns of a float32 result stored at a time: pages fill most of shared memory."""
        return 64 if self.slots == 1 else 32

    @property
    def loaded(self) -> int:
        """Rows loaded for a KV head: its queries, and with `append` its new K and V."""
        return self.group + 2 * self.append

    @property
    def padding(self) -> int:
        """Queries added so that a copy of one float32 a query is a multiple of 16 bytes; over
        quantised pages, so that they fill all columns of a product."""
        return self.queries - self.group if self.scaled else -self.group % 4

    @property
    def part_shape(self) -> tuple[int, int]:
        """Shape of a part's result: [G, H], or over quantised pages [H, Q]."""
        if self.scaled:
            return self.head_dim, self.queries
        return self.group, self.head_dim

    @property
    def capacity(self) -> int:
        """Most parts of all rows together."""
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
    """Make the plan of a launch.

    Args:
      loaded: [B, K, G, H] queries, with `append` [B, K, G + 2, H].
      k_pages, page_table, append, scale, logit_soft_cap, sliding_window: as in the operations.
      weights_in_registers: see `Plan`.
      parts: pieces of work that share a row and a KV head; None chooses.
      programs: most blocks of threads.
      readers: warpgroups of a program that compute, 1 or 2. None takes two over quantised pages
        where both fit, so that one converts while the other waits; else one.

    Raises:
      ValueError: readers is neither 1 nor 2, or 2 over pages that are not quantised or without
        room.
    """
    rows, kv_heads, loaded_rows, head_dim = loaded.shape
    page_size, width = elements_of(k_pages).shape[2], page_table.shape[1]
    pieces, tokens = rows * kv_heads, width * page_size
    scaled = isinstance(k_pages, QuantisedPages)
    if parts is None and scaled:  # this kernel stores all rows whole or all in parts
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
    """Most blocks seen of a row that fills its page table."""
    blocks = pl.cdiv(tokens, BLOCK)
    return blocks if sliding_window is None else min(blocks, pl.cdiv(sliding_window, BLOCK) + 1)


def choose_parts(
    pieces: int, tokens: int, sliding_window: int | None, programs: int
) -> int | ByLength:
    """Choose the number of parts of rows. Rows are cut by their own length where a row can be long
    and whole rows are enough work, or nearly so, for all programs.

    Args:
      pieces: rows * KV heads.
      tokens: tokens of a row that fills its page table.
    """
    parts = even_parts(pieces, pl.cdiv(tokens, BLOCK), programs)
    visible = visible_blocks(tokens, sliding_window)
    if (parts > 1 and pieces < programs) or visible <= _WHOLE:
        return parts
    return ByLength(_WHOLE, max(_PART, pl.cdiv(visible, _MOST_OF_A_LONG_ROW)))


def even_parts(pieces: int, blocks: int, programs: int) -> int:
    """Choose the number of parts of each of `pieces` pieces of `blocks` blocks, so that the busiest
    program ends earliest."""

    def time(parts: int) -> float:
        turns = pl.cdiv(pieces * parts, programs)
        return turns * (pl.cdiv(blocks, parts) + _PIECE_COST) + (parts > 1) * _JOIN_COST

    return min(range(1, min(blocks, _MOST_PARTS) + 1), key=time)
