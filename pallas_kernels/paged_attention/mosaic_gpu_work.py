"""The work of decode attention on Hopper GPUs: a launch cut into pieces, and dealt to programs.

Every row is cut into as many parts as any other, or each into as many as its own length asks for.
Then there is a list of them, made on the device, where the lengths are: the longest come first, so
that no program begins one when the others are about to end. A row's parts depend on its own length
and on the launch's shapes, the width of the table among them, not on how long other rows are: how
sums are grouped shows in their bits.
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
"""In place of a sum of 0 where a part saw nothing: 0 / it is 0, and its logarithm finite."""


@dataclass(frozen=True)
class Refs:
    """The operands of a launch; those of `append` alone may be missing."""

    loaded: Any  # [B, K, G, H] queries, or [B, K, G + 2, H] with K and V
    table: Any  # i32[B, W]
    lens: Any  # i32[B]
    rings: Rings
    cut: Any = None  # i32[B * parts + 1], see `cut`; None where all rows have as many parts
    row_scale: Any = None  # f32[B]
    cos: Any = None  # f32[B, H/2]
    sin: Any = None  # f32[B, H/2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """Where a piece of work is: what is read from memory to know it."""

    row: jax.Array
    head: jax.Array
    part: jax.Array
    kv_len: jax.Array
    row_scale: jax.Array | None  # with `append`


@dataclass(frozen=True)
class Work(Place):
    """A piece of work: the blocks of a row's pages that are read for one KV head."""

    parts: jax.Array  # of the row
    oldest: jax.Array  # position of the first visible token
    end: jax.Array  # position behind the last one that is in the pages
    first: jax.Array  # block
    count: jax.Array  # of blocks


@dataclass(frozen=True)
class Turn:
    """A program's turn with a piece of work.

    Attributes:
      n: of those that the program has had.
      work: the piece.
      steps: blocks of the pieces before.
      following: the next piece, if there are `more`.
    """

    n: jax.Array
    work: Work
    steps: jax.Array
    following: Place
    more: jax.Array


def cut(plan: Plan, lens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where each row is cut by its own length, the list of parts, and how many each row has.

    Made by comparing everything with everything, in two small kernels: XLA's sort takes longer.

    Args:
      lens: i32[B]

    Returns:
      i32[B * parts + 1] row * parts + part, those of most blocks first, and in the end how many
      there are; i32[B].
    """
    _, _, start, stop = _visible(plan, lens)
    parts = _parts(plan, stop - start)
    size = _up(stop - start, parts)
    row = jnp.arange(plan.rows, dtype=jnp.int32)
    earlier = (size > size[:, None]) | ((size == size[:, None]) & (row < row[:, None]))
    begin = jnp.where(earlier, parts, 0).sum(axis=1)  # [B]
    at = jnp.arange(plan.capacity + 1, dtype=jnp.int32)[:, None]
    part = at - begin
    here = jnp.where((part >= 0) & (part < parts), row * plan.parts + part, 0)
    return jnp.where(at == plan.capacity, parts, here).sum(axis=1), parts


def place(plan: Plan, refs: Refs, n: jax.Array) -> Place:
    """Of the piece that this program takes as its n-th."""
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
    """Calls do(turn) for each piece of work of this program, while it is read where the next one
    is. Returns how many blocks all of them have."""
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
    """Of the piece that this program takes as its n-th. Where the longest come first, the program
    that began with the longest goes on with the shortest."""
    program = lax.axis_index("program")
    if plan.by_length is not None:
        program = jnp.where(n == 0, program, plan.programs - 1 - program)
    return program + n * plan.programs


@dataclass(frozen=True)
class Blocks:
    """A reader's blocks of a piece of work, of two readers every other one, as they come through
    the rings.

    Barriers count how often they are waited for, so that each reader waits for all blocks: for the
    other one's between its own.
    """

    plan: Plan
    rings: Rings
    work: Work
    steps: jax.Array  # blocks of the pieces of work before
    reader: int = 0

    @property
    def count(self) -> jax.Array:
        """Of this reader's."""
        readers = self.plan.readers
        return lax.div(self.work.count + readers - 1 - self.reader, jnp.int32(readers))

    def token(self, j: jax.Array) -> jax.Array:
        """The first one of the j-th."""
        return (self.work.first + self._index(j)) * BLOCK

    def take(self, ring: Ring, j: jax.Array) -> jax.Array:
        """Waits for the j-th; the stage it is in, which is to be freed. One after another."""
        index = self._index(j)
        if self.plan.readers > 1:
            pl.when(index > 0)(partial(self._skip, ring, index - 1))
        stage = self._stage(index)
        plgpu.barrier_wait(ring.full.at[stage])
        return stage

    def leave(self) -> None:
        """After the last one."""
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
    """Splits a row's blocks evenly; the last parts of a short row may get none."""
    oldest, end, start, stop = _visible(plan, here.kv_len)
    parts = _parts(plan, stop - start)
    each = _up(stop - start, parts)
    first = start + here.part * each
    count = jnp.clip(stop - first, 0, each)
    return Work(**vars(here), parts=parts, oldest=oldest, end=end, first=first, count=count)


def _visible(plan: Plan, kv_len: jax.Array) -> tuple[jax.Array, ...]:
    """Position of the first visible token, and that behind the last one that is in the pages; first
    block, and that behind the last."""
    window = plan.sliding_window
    oldest = jnp.zeros_like(kv_len) if window is None else jnp.maximum(kv_len - window, 0)
    end = jnp.maximum(kv_len - 1, 0) if plan.append else kv_len
    start, stop = lax.div(oldest, jnp.full_like(oldest, BLOCK)), _up(end, BLOCK)
    return oldest, end, start, jnp.maximum(start, stop)


def _parts(plan: Plan, blocks: jax.Array) -> jax.Array:
    """Of a row of so many visible blocks."""
    if plan.by_length is None:
        return jnp.full_like(blocks, plan.parts)
    whole = blocks <= plan.by_length.whole
    return jnp.where(whole, 1, _up(blocks, plan.by_length.part))


def _up(x: jax.Array, by: jax.Array | int) -> jax.Array:
    """x / by, rounded up."""
    by = jnp.broadcast_to(jnp.asarray(by, x.dtype), x.shape)
    return lax.div(x + by - 1, by)
