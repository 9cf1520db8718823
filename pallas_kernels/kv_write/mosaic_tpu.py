"""rope_and_write as a Mosaic kernel for TPUs.

Programs run one after another, each on a block of tokens. A TPU's memory is tiled, with several
tokens of a page to a tile, and a copy moves whole tiles. So a program reads the tiles that its
tokens go to while it rotates them, inserts the new rows, and writes the tiles back: one tile a
token in decode, one tile for all its tokens in prefill. Tokens may come in any order. Tests
interpret and lower the kernel, and the compiler of libtpu 0.0.48 takes it for v5e and v6e; it has
not run on a TPU yet.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.finite import finite_below, guarded
from pallas_kernels.tpu_tiles import LANES, pages_refusal, tile_rows

_BUFFER_BYTES = 4 << 20  # VMEM for tiles, and as much for qkv and q; it holds at least 16 MiB
_MAX_BLOCK_TOKENS = 128
_FEWEST_BLOCK_TOKENS = 16  # a tile of bfloat16
_RUNS_BYTES = 512 << 10  # scalar memory for runs: half of it


@dataclass(frozen=True)
class _Plan:
    """The static parameters of a launch."""

    block: int  # tokens of a program
    tile: int  # tokens of a tile of a page
    page_size: int
    kv_heads: int
    group: int
    head_dim: int

    @property
    def piece(self) -> int:
        """Columns of a piece of the float32 rows to write: wider rows can't be read at any
        offset."""
        return math.gcd(self.head_dim, LANES)


def refusal(qkv: jax.Array, k_pages: jax.Array, slot_mapping: jax.Array) -> str | None:
    """Say why the kernel does not take these arguments, or return None."""
    for name, array in (("qkv", qkv), ("the pages", k_pages)):
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} must be float32 or bfloat16, not {array.dtype}"
    if reason := pages_refusal(k_pages):
        return reason
    if _fitting_tokens(qkv, k_pages) < _FEWEST_BLOCK_TOKENS:
        return f"{_FEWEST_BLOCK_TOKENS} tokens exceed the buffers of {_BUFFER_BYTES} bytes"
    if 12 * slot_mapping.size > _RUNS_BYTES:
        return f"{slot_mapping.size} tokens, at 12 bytes each, exceed {_RUNS_BYTES} bytes"
    return None


def rope_and_write(
    qkv: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    slot_mapping: jax.Array,
    *,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.kv_write.api.rope_and_write`; arguments are already checked.

    Args:
      interpret: run in Pallas' interpreter, on the CPU.
    """
    tokens, kv_heads, rows, head_dim = qkv.shape
    plan = _Plan(
        block=_block_tokens(qkv, k_pages),
        tile=tile_rows(k_pages),
        page_size=k_pages.shape[2],
        kv_heads=kv_heads,
        group=rows - 2,
        head_dim=head_dim,
    )
    columns = kv_heads * rows * head_dim
    if bias is None:
        bias = jnp.zeros((columns,), jnp.float32)
    q_shape = jax.ShapeDtypeStruct((tokens, kv_heads * plan.group * head_dim), qkv.dtype)
    pool_shape = jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype)
    kernel = pl.pallas_call(
        partial(_write_block, plan),
        out_shape=(q_shape, pool_shape, pool_shape),
        grid_spec=_grid(plan, tokens, k_pages.dtype),
        input_output_aliases={8: 1, 9: 2},  # the pools; the three scalar operands count, too
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="rope_and_write",
    )
    # qkv has two dimensions, as the projection made it: a dimension of J rows would be padded.
    q, k_pages, v_pages = kernel(
        *_runs(plan, slot_mapping),
        qkv.reshape(tokens, columns),
        scale[:, None],
        bias.reshape(1, columns),
        cos,
        sin,
        k_pages,
        v_pages,
    )
    return q.reshape(tokens, kv_heads * plan.group, head_dim), k_pages, v_pages


def _grid(plan: _Plan, tokens: int, dtype: Any) -> pltpu.PrefetchScalarGridSpec:
    """Describe the part of each argument of _write_block that a program sees, and its scratch."""
    kv_heads, head_dim = plan.kv_heads, plan.head_dim
    columns = kv_heads * (plan.group + 2) * head_dim

    def by_block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((plan.block, width), lambda block, *_: (block, 0))

    in_place = pl.BlockSpec(memory_space=pl.ANY)
    pieces = (head_dim // plan.piece, kv_heads, plan.block + 2 * plan.tile, plan.piece)
    new = pltpu.VMEM(pieces, jnp.float32)
    tiles = pltpu.VMEM((plan.block, kv_heads, plan.tile, head_dim), dtype)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(pl.cdiv(tokens, plan.block),),
        in_specs=[
            by_block(columns),
            by_block(1),
            pl.BlockSpec((1, columns), lambda *_: (0, 0)),
            by_block(head_dim // 2),
            by_block(head_dim // 2),
            in_place,
            in_place,
        ],
        out_specs=(by_block(kv_heads * plan.group * head_dim), in_place, in_place),
        scratch_shapes=[new, new, tiles, tiles, pltpu.SemaphoreType.DMA((2,))],
    )


def _fitting_tokens(qkv: jax.Array, k_pages: jax.Array) -> int:
    """Number of tokens that fit the buffers: tiles of K and V, and double buffers of qkv and q."""
    _, kv_heads, rows, head_dim = qkv.shape
    tile_bytes = 2 * kv_heads * tile_rows(k_pages) * head_dim * k_pages.dtype.itemsize
    row_bytes = 2 * kv_heads * (2 * rows - 2) * head_dim * qkv.dtype.itemsize
    return _BUFFER_BYTES // max(tile_bytes, row_bytes)


def _block_tokens(qkv: jax.Array, k_pages: jax.Array) -> int:
    """Number of tokens of a program: whole tiles of qkv, or all tokens."""
    fitting = min(_fitting_tokens(qkv, k_pages), _MAX_BLOCK_TOKENS)
    return min(fitting - fitting % _FEWEST_BLOCK_TOKENS, len(qkv))


def _runs(plan: _Plan, slot_mapping: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute three arrays i32[blocks * block] over the tokens.

    A run is a series of tokens that go to consecutive slots of one tile.

    Returns:
      The token's slot.
      The index within the block of the first token that goes to the same tile.
      The length of the run that begins at this token; 0 where none does, or for padding.
    """
    padding = -len(slot_mapping) % plan.block
    slots = jnp.pad(slot_mapping, (0, padding), constant_values=-1).reshape(-1, plan.block)
    tile = slots // plan.tile
    first = (tile[:, :, None] == tile[:, None, :]).argmax(axis=2).astype(jnp.int32)
    index = jnp.arange(plan.block, dtype=jnp.int32)
    joins = (slots == jnp.roll(slots, 1, axis=1) + 1) & (tile == jnp.roll(tile, 1, axis=1))
    begins = ~joins | (index == 0)
    beginning = jnp.where(begins, index, plan.block)
    after = lax.cummin(beginning, axis=1, reverse=True)[:, 1:]  # where the next run begins
    after = jnp.pad(after, ((0, 0), (0, 1)), constant_values=plan.block)
    length = jnp.where(begins & (slots >= 0), after - index, 0)
    return slots.reshape(-1), first.reshape(-1), length.reshape(-1)


def _write_block(
    plan: _Plan,
    slot_ref: jax.Ref,  # i32[blocks * block], scalar memory, like the next two; see _runs
    first_ref: jax.Ref,
    length_ref: jax.Ref,
    qkv_ref: jax.Ref,  # [block, K * J * H]
    scale_ref: jax.Ref,  # f32[block, 1]
    bias_ref: jax.Ref,  # [1, K * J * H]
    cos_ref: jax.Ref,  # f32[block, H/2]
    sin_ref: jax.Ref,  # f32[block, H/2]
    k_before: jax.Ref,  # [K, P, S, H], HBM, the same memory as k_ref
    v_before: jax.Ref,
    q_ref: jax.Ref,  # [block, N * H]
    k_ref: jax.Ref,  # [K, P, S, H], HBM
    v_ref: jax.Ref,
    k_new: jax.Ref,  # f32[pieces of H, K, tile + block + tile, piece]
    v_new: jax.Ref,
    k_tiles: jax.Ref,  # [block, K, tile, H], each tile at the first token that goes to it
    v_tiles: jax.Ref,
    arrived: jax.Ref,  # semaphores [2]
) -> None:
    del k_before, v_before
    start = pl.program_id(0) * plan.block
    sides = ((k_ref, k_new, k_tiles), (v_ref, v_new, v_tiles))

    def each_run(act: Callable[[jax.Array, jax.Array], None]) -> None:
        @pl.loop(0, plan.block)
        def _(token: jax.Array) -> None:
            pl.when(length_ref[start + token] > 0)(lambda: act(token, slot_ref[start + token]))

    def each_tile(act: Callable[[Any, Any, Any], None]) -> None:
        """Call `act` with each tile in the pool, its copy here, and a semaphore."""

        def of_run(token: jax.Array, slot: jax.Array) -> None:
            at = lax.rem(slot, plan.page_size) - lax.rem(slot, plan.tile)
            rows = pl.ds(pl.multiple_of(at, plan.tile), plan.tile)

            @pl.when(first_ref[start + token] == token)
            def _() -> None:
                for kind, (pages, _, tiles) in enumerate(sides):
                    there = pages.at[:, lax.div(slot, plan.page_size), rows]
                    act(there, tiles.at[token], arrived.at[kind])

        each_run(of_run)

    def insert(token: jax.Array, slot: jax.Array) -> None:
        for _, new, tiles in sides:
            tile = tiles.at[first_ref[start + token]]
            _insert(plan, new, token, lax.rem(slot, plan.tile), length_ref[start + token], tile)

    each_tile(lambda there, here, done: pltpu.make_async_copy(there, here, done).start())
    below = finite_below(k_ref.dtype)
    _rotate_block(plan, qkv_ref, scale_ref, bias_ref, cos_ref, sin_ref, q_ref, k_new, v_new, below)
    each_tile(lambda there, here, done: pltpu.make_async_copy(there, here, done).wait())
    each_run(insert)
    each_tile(lambda there, here, done: pltpu.make_async_copy(here, there, done).start())
    # Wait for the writes, since the next block may read the same tiles.
    each_tile(lambda there, here, done: pltpu.make_async_copy(here, there, done).wait())


def _insert(
    plan: _Plan, new: Any, token: jax.Array, offset: jax.Array, length: jax.Array, tile: Any
) -> None:
    """Copy `length` rows of `new`, from `token` on, into a tile [K, tile, H], from `offset` on."""
    row = lax.broadcasted_iota(jnp.int32, (1, plan.tile, 1), 1)
    inserted = (offset <= row) & (row < offset + length)
    for piece in range(plan.head_dim // plan.piece):
        rows = new[piece, :, pl.ds(plan.tile + token - offset, plan.tile)]
        part = tile.at[:, :, _columns(piece, plan.piece)]
        # Older TPUs select only among 32-bit numbers.
        part[...] = jnp.where(inserted, rows, part[...].astype(jnp.float32)).astype(part.dtype)


def _rotate_block(
    plan: _Plan,
    qkv_ref: jax.Ref,
    scale_ref: jax.Ref,
    bias_ref: jax.Ref,
    cos_ref: jax.Ref,
    sin_ref: jax.Ref,
    q_ref: jax.Ref,
    k_new: jax.Ref,
    v_new: jax.Ref,
    below: float,
) -> None:
    """Do all of _write_block but the pages.

    The arguments are those of _write_block, and `finite_below` of the pages' type.
    """
    group, head_dim, half = plan.group, plan.head_dim, plan.head_dim // 2
    scale, cos, sin = scale_ref[...], cos_ref[...], sin_ref[...]
    inner = pl.ds(plan.tile, plan.block)

    def scaled(head: int, row: int) -> jax.Array:
        at = _columns(head * (group + 2) + row, head_dim)
        return qkv_ref[:, at].astype(jnp.float32) * scale + bias_ref[:, at].astype(jnp.float32)

    for head, row in product(range(plan.kv_heads), range(group + 1)):
        x = scaled(head, row)
        a, b = x[:, :half], x[:, half:]
        x = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)
        if row < group:
            q_ref[:, _columns(head * group + row, head_dim)] = x.astype(q_ref.dtype)
            continue
        k, v = guarded(x, scaled(head, group + 1), below)
        for new, values in ((k_new, k), (v_new, v)):
            for piece, columns in enumerate(jnp.split(values, head_dim // plan.piece, axis=1)):
                new[piece, head, inner] = columns


def _columns(i: int, width: int) -> Any:
    """Slice the columns of the i-th of parts of `width` columns."""
    return pl.ds(i * width, width)
