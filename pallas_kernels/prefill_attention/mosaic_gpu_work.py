"""The work of prefill attention on Hopper GPUs: what a launch is told, and the pieces of work that
each block of threads takes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import ROWS, Rings

COMPUTE = 2
"""Number of warpgroups that compute, each for 64 rows."""

TILE = COMPUTE * ROWS
"""Most tokens of the packed batch in a piece of work."""

BLOCK = 128
"""Tokens of a stage of the rings."""

SLOTS = 2
"""Number of pieces of work whose queries are in shared memory."""


@dataclass(frozen=True)
class Plan:
    """The static parameters of a launch."""

    heads: int
    group: int
    head_dim: int
    page_size: int
    listed_pages: int  # entries of the list, padding included
    tiles: int  # rows of the tile table
    programs: int
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None
    weights_in_registers: bool
    """Whether weights stay in registers; Pallas' interpreter takes them from shared memory."""

    @property
    def stages(self) -> int:
        """Number of stages of the rings; a stage holds a block of K and of V."""
        return 2 if self.head_dim == 128 else 4

    @property
    def work(self) -> int:
        """Number of pieces of work."""
        return self.tiles * self.heads


@dataclass(frozen=True)
class Refs:
    """The arrays of a launch in global memory, and its rings."""

    q: Any  # [T, N, H]
    kv_pages: Any  # i32[Z]
    tiles: Any  # i32[tiles, fields]
    out: Any  # [T, N, H]
    rings: Rings


class Block(NamedTuple):
    """A block of the pages of a sequence."""

    head: jax.Array  # the KV head
    page: jax.Array  # where the sequence's pages begin in the list
    number: jax.Array  # among the sequence's blocks


class Work(NamedTuple):
    """A sequence's part of a tile, for one query head, and the blocks that it reads."""

    head: jax.Array  # the query head
    token: jax.Array  # first token of the tile, in the packed batch
    begin: jax.Array  # first row of the sequence
    end: jax.Array  # its last row + 1; not more than `begin` where there is no such piece
    position: jax.Array  # position of row 0; may be less than 0
    page: jax.Array  # where the sequence's pages begin in the list

    @property
    def exists(self) -> jax.Array:
        return self.begin < self.end

    def first(self, plan: Plan) -> jax.Array:
        """Return the first block that a row sees."""
        if plan.sliding_window is None:
            return jnp.int32(0)
        oldest = self.position + self.begin - plan.sliding_window + 1
        return lax.div(jnp.maximum(oldest, 0), jnp.int32(BLOCK))

    def blocks(self, plan: Plan) -> jax.Array:
        """Return the number of blocks: at least one, of which rows that pad the batch see none."""
        stop = lax.div(jnp.maximum(self.position + self.end, 0) + (BLOCK - 1), jnp.int32(BLOCK))
        return jnp.maximum(stop - self.first(plan), 1)

    def rows(self, warpgroup: jax.Array | int) -> tuple[Any, jax.Array]:
        """Return the tokens of a warpgroup's half of the tile, and the head."""
        return pl.ds(pl.multiple_of(self.token + warpgroup * ROWS, ROWS), ROWS), self.head

    def block(self, plan: Plan, i: jax.Array | int) -> Block:
        """Return the i-th block."""
        return Block(lax.div(self.head, jnp.int32(plan.group)), self.page, self.first(plan) + i)


def nth_work(plan: Plan, refs: Refs, n: jax.Array) -> Work:
    """Return the n-th piece of work of this program. Those that do not exist come last."""
    program = lax.axis_index("program")
    start = n * plan.programs
    forth, back = start + program, start + plan.programs - 1 - program
    index = jnp.where(lax.rem(n, jnp.int32(2)) == 0, forth, back)
    placed = jnp.minimum(index, plan.work - 1)
    heads = jnp.int32(plan.heads)
    tile, head = lax.div(placed, heads), lax.rem(placed, heads)
    token, begin, end, position, page = (refs.tiles[tile, field] for field in range(5))
    return Work(head, token, begin, jnp.where(index < plan.work, end, begin), position, page)
