"""The work of decode attention on Hopper GPUs: a launch cut into pieces, and dealt to programs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import Rings

BLOCK = 64
"""Tokens of a stage of the rings."""

NO_SUM = 1e-30
"""In place of a sum of 0 where a part saw nothing: 0 / it is 0, and its logarithm finite."""

_COLUMNS = 128  # of a product with V, at most: registers hold its result beside the running sums
_RING_BYTES = 160 << 10
_SCALED_BYTES = 216 << 10  # of all that a program over quantised pages shares


@dataclass(frozen=True)
class Plan:
    """What is known of a launch before it is traced."""

    rows: int
    kv_heads: int
    group: int
    head_dim: int
    width: int  # entries of a row of the page table
    page_size: int
    parts: int  # pieces of work that share a row and a KV head
    programs: int  # a multiple of `pairs`
    pairs: int  # of warpgroups in a block of threads, each of which is a program
    append: bool
    scaled: bool  # whether pages are int8 with scales
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None

    @property
    def stages(self) -> int:
        """Of the rings; a stage holds a block of K and of V."""
        if not self.scaled:
            return max(2, min(8, _RING_BYTES // (4 * BLOCK * self.head_dim)))
        # Rows of pieces of work, two tiles, new elements; queries, weights and results beside them.
        fixed = (2 * self.slots + 4 + 2 * self.append) * BLOCK * self.head_dim
        fixed += self.queries * (6 * self.head_dim + 2 * BLOCK)
        room = _SCALED_BYTES // self.pairs - fixed
        return max(2, min(8, room // (2 * BLOCK * (self.head_dim + 4))))

    @property
    def queries(self) -> int:
        """Of a KV head, as columns of a product."""
        return self.group + -self.group % 8

    @property
    def slots(self) -> int:
        """For the queries of a piece of work, so that the next one's are there when it begins."""
        return 1 if self.head_dim > 128 or self.parts > 1 or self.pairs > 1 else 2

    @property
    def columns(self) -> tuple[slice, ...]:
        """Of the head dim, as products with V take them."""
        size = min(self.head_dim, _COLUMNS)
        return tuple(slice(at, at + size) for at in range(0, self.head_dim, size))

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
    def work(self) -> int:
        """Pieces of work."""
        return self.rows * self.kv_heads * self.parts


@dataclass(frozen=True)
class Refs:
    """The operands of a launch, as a program sees them; those of `append` alone may be missing."""

    program: jax.Array  # its index
    loaded: Any  # [B, K, G, H] queries, or [B, K, G + 2, H] with K and V
    table: Any  # i32[B, W]
    lens: Any  # i32[B]
    rings: Rings
    row_scale: Any = None  # f32[B]
    cos: Any = None  # f32[B, H/2]
    sin: Any = None  # f32[B, H/2]


@dataclass(frozen=True)
class Work:
    """A piece of work: the blocks of a row's pages that are read for one KV head."""

    row: jax.Array
    head: jax.Array
    part: jax.Array
    kv_len: jax.Array
    oldest: jax.Array  # position of the first visible token
    end: jax.Array  # position behind the last one that is in the pages
    first: jax.Array  # block
    count: jax.Array  # of blocks


def each_work(
    plan: Plan, refs: Refs, do: Callable[[jax.Array, Work, jax.Array], None]
) -> jax.Array:
    """Calls do(n, work, steps) for the n-th piece of work of this program; `steps` counts the
    blocks of those before. Returns that of all of them."""
    program = refs.program

    def turn(n: jax.Array, steps: jax.Array) -> jax.Array:
        work = _work(plan, refs, program + n * plan.programs)
        do(n, work, steps)
        return steps + work.count

    mine = lax.div(plan.work - program + plan.programs - 1, jnp.int32(plan.programs))
    return lax.fori_loop(0, mine, turn, jnp.int32(0))


def _work(plan: Plan, refs: Refs, index: jax.Array) -> Work:
    """Splits a row's blocks evenly; the last parts of a short row may get none."""
    part = lax.rem(index, jnp.int32(plan.parts))
    head = lax.rem(lax.div(index, jnp.int32(plan.parts)), jnp.int32(plan.kv_heads))
    row = lax.div(index, jnp.int32(plan.parts * plan.kv_heads))
    kv_len = refs.lens[row]
    window = plan.sliding_window
    oldest = jnp.int32(0) if window is None else jnp.maximum(kv_len - window, 0)
    end = jnp.maximum(kv_len - 1, 0) if plan.append else kv_len
    start = lax.div(oldest, jnp.int32(BLOCK))
    stop = lax.div(end + (BLOCK - 1), jnp.int32(BLOCK))
    each = lax.div(jnp.maximum(stop - start, 0) + (plan.parts - 1), jnp.int32(plan.parts))
    first = start + part * each
    return Work(row, head, part, kv_len, oldest, end, first, jnp.clip(stop - first, 0, each))
