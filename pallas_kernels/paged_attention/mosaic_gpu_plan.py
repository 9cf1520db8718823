"""How a launch of decode attention is cut on Hopper GPUs into pieces of work, and how many
warpgroups compute each. By shape alone, since it shows in the bits of a result.
"""

from dataclasses import replace

import jax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import PROCESSORS
from pallas_kernels.paged_attention.mosaic_gpu_work import BLOCK, ByLength, Plan
from pallas_kernels.quantised import Pages, QuantisedPages, elements_of

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
