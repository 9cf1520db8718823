"""Cuts a launch of decode attention on Hopper GPUs into pieces of work, and deals them to programs.

All rows are cut into the same number of parts, or each row by its own length. In the latter case
the device, which has the lengths, makes a list of the parts. The longest come first, so that no
program begins one when the others are about to end. A row's parts depend on its own length and on
the launch's shapes, including the width of the table, but not on other rows' lengths: the grouping
of sums affects their bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import Ring, Rings
from pallas_kernels.paged_attention.mosaic_gpu_plan import BLOCK, Plan

NO_SUM = 1e-30
"""Replaces a sum of 0 where a part saw no token: 0 divided by it is 0, and its log is finite."""


@dataclass(frozen=True)
class Refs:
    """The operands of a launch; those that only `append` takes may be missing."""

    loaded: Any  # [B, K, G, H] queries, or [B, K, G + 2, H] with K and V
    table: Any  # i32[B, W]
    lens: Any  # i32[B]
    rings: Rings
    cut: Any = None  # i32[B * parts + 1], see `cut`; None where all rows have the same parts
    row_scale: Any = None  # f32[B]
    cos: Any = None  # f32[B, H/2]
    sin: Any = None  # f32[B, H/2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """The place of a piece of work: the fields that are read from memory."""

    row: jax.Array
    head: jax.Array
    part: jax.Array
    kv_len: jax.Array
    row_scale: jax.Array | None  # with `append`


@dataclass(frozen=True)
class Work(Place):
    """A piece of work: the blocks of a row's pages that are read for one KV head."""

    parts: jax.Array  # number of parts of the row
    oldest: jax.Array  # position of the first visible token
    end: jax.Array  # position behind the last token in the pages
    first: jax.Array  # first block
    count: jax.Array  # number of blocks


@dataclass(frozen=True)
class Turn:
    """A program's turn with a piece of work.

    Attributes:
      n: number of pieces that the program took before.
      work: the piece.
      steps: blocks of the pieces before.
      following: the next piece's place, if there are `more`.
    """

    n: jax.Array
    work: Work
    steps: jax.Array
    following: Place
    more: jax.Array


def cut(plan: Plan, lens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cut each row by its own length; return the list of parts, and each row's number of parts.

    It compares all rows with one another, in two small kernels: XLA's sort takes longer.

    Args:
      lens: i32[B]

    Returns:
      i32[B * parts + 1], row * parts + part for each part, those of most blocks first; the last
      element is their number. i32[B], the number of parts of each row.
    """
    _, _, start, stop = _visible(plan, lens)
    parts = _parts(plan, stop - start)
    size = _divided_up(stop - start, parts)
    row = jnp.arange(plan.rows, dtype=jnp.int32)
    earlier = (size > size[:, None]) | ((size == size[:, None]) & (row < row[:, None]))
    begin = jnp.where(earlier, parts, 0).sum(axis=1)  # [B]
    at = jnp.arange(plan.capacity + 1, dtype=jnp.int32)[:, None]
    part = at - begin
    here = jnp.where((part >= 0) & (part < parts), row * plan.parts + part, 0)
    return jnp.where(at == plan.capacity, parts, here).sum(axis=1), parts


def place(plan: Plan, refs: Refs, n: jax.Array) -> Place:
    """Return the place of this program's n-th piece."""
    index = _index(plan, n)
    if refs.cut is None:
        part = lax.rem(index, jnp.int32(plan.parts))
        head = lax.rem(lax.div(index, jnp.int32(plan.parts)), jnp.int32(plan.kv_heads))
        row = lax.div(index, jnp.int32(plan.parts * plan.kv_heads))
    else:
        entry = refs.cut[lax.div(index, jnp.int32(plan.kv_heads))]
        head = lax.rem(index, jnp.int32(plan.kv_heads))
        row, part = lax.div(entry, jnp.int32(plan.parts)), lax.rem(entry, jnp.int32(plan.parts))
    return Place(row, head, part, refs.lens[row], refs.row_scale[row] if plan.append else None)


def each_work(plan: Plan, refs: Refs, do: Callable[[Turn], None]) -> jax.Array:
    """Call do(turn) for each piece of work of this program, while the next one's place is read.

    Return the number of blocks of all pieces.
    """
    parts = jnp.int32(plan.capacity) if refs.cut is None else refs.cut[plan.capacity]
    pieces = parts * plan.kv_heads  # at least as many as programs
    rounds = lax.div(pieces, jnp.int32(plan.programs))  # those that all programs take part in
    turns = rounds + (_index(plan, rounds) < pieces).astype(jnp.int32)

    def take(n: jax.Array, carry: tuple[jax.Array, Place]) -> tuple[jax.Array, Place]:
        steps, here = carry
        work = _work(plan, here)
        following = place(plan, refs, jnp.minimum(n + 1, turns - 1))
        do(Turn(n, work, steps, following, n + 1 < turns))
        return steps + work.count, following

    first = place(plan, refs, jnp.int32(0))
    steps, _ = lax.fori_loop(0, turns, take, (jnp.int32(0), first))
    return steps


def _index(plan: Plan, n: jax.Array) -> jax.Array:
    """Return the index of this program's n-th piece. Where the longest come first, the program with
    the longest first piece takes the shortest second one."""
    program = lax.axis_index("program")
    if plan.by_length is not None:
        program = jnp.where(n == 0, program, plan.programs - 1 - program)
    return program + n * plan.programs


@dataclass(frozen=True)
class Blocks:
    """A reader's blocks of a piece of work, as they come through the rings. Two readers take
    alternate blocks.

    A barrier counts the waits on it, so each reader waits for all blocks, including the other
    reader's blocks between its own.
    """

    plan: Plan
    rings: Rings
    work: Work
    steps: jax.Array  # blocks of the pieces of work before
    reader: int = 0

    @property
    def count(self) -> jax.Array:
        """Number of this reader's blocks."""
        readers = self.plan.readers
        return lax.div(self.work.count + readers - 1 - self.reader, jnp.int32(readers))

    def token(self, j: jax.Array) -> jax.Array:
        """Return the position of the first token of the j-th block."""
        return (self.work.first + self._index(j)) * BLOCK

    def take(self, ring: Ring, j: jax.Array) -> jax.Array:
        """Wait for the j-th block; return its stage, which the caller must free. Blocks must be
        taken in order."""
        index = self._index(j)
        if self.plan.readers > 1:
            pl.when(index > 0)(partial(self._skip, ring, index - 1))
        stage = self._stage(index)
        plgpu.barrier_wait(ring.full.at[stage])
        return stage

    def leave(self) -> None:
        """End after the last block: skip a block of the other reader behind it."""
        if self.plan.readers == 1:
            return
        behind = self._index(self.count) - 1
        for ring in (self.rings.k, self.rings.v):
            unseen = (behind >= 0) & (behind < self.work.count)
            pl.when(unseen)(partial(self._skip, ring, behind))

    def _index(self, j: jax.Array) -> jax.Array:
        return j * self.plan.readers + self.reader

    def _stage(self, index: jax.Array) -> jax.Array:
        return lax.rem(self.steps + index, jnp.int32(self.plan.stages))

    def _skip(self, ring: Ring, index: jax.Array) -> None:
        stage = self._stage(index)
        plgpu.barrier_wait(ring.full.at[stage])
        plgpu.barrier_arrive(ring.free.at[stage])


def _work(plan: Plan, here: Place) -> Work:
    """Split a row's blocks evenly; the last parts of a short row may get none."""
    oldest, end, start, stop = _visible(plan, here.kv_len)
    parts = _parts(plan, stop - start)
    each = _divided_up(stop - start, parts)
    first = start + here.part * each
    count = jnp.clip(stop - first, 0, each)
    return Work(**vars(here), parts=parts, oldest=oldest, end=end, first=first, count=count)


def _visible(plan: Plan, kv_len: jax.Array) -> tuple[jax.Array, ...]:
    """Return the positions of the first visible token and behind the last token in the pages, then
    the first block and the block behind the last."""
    window = plan.sliding_window
    oldest = jnp.zeros_like(kv_len) if window is None else jnp.maximum(kv_len - window, 0)
    end = jnp.maximum(kv_len - 1, 0) if plan.append else kv_len
    start, stop = lax.div(oldest, jnp.full_like(oldest, BLOCK)), _divided_up(end, BLOCK)
    return oldest, end, start, jnp.maximum(start, stop)


def _parts(plan: Plan, blocks: jax.Array) -> jax.Array:
    """Number of parts of a row of `blocks` visible blocks."""
    if plan.by_length is None:
        return jnp.full_like(blocks, plan.parts)
    whole = blocks <= plan.by_length.whole
    return jnp.where(whole, 1, _divided_up(blocks, plan.by_length.part))


def _divided_up(x: jax.Array, by: jax.Array | int) -> jax.Array:
    """Return x / by, rounded up."""
    by = jnp.broadcast_to(jnp.asarray(by, x.dtype), x.shape)
    return lax.div(x + by - 1, by)
