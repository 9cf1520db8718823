"""gather as a Mosaic kernel for Hopper GPUs, which only copies.

A program takes some pieces of pages of one pool. The tensor memory accelerator loads them all into
shared memory and stores each as soon as it has arrived; other programs of the same processor keep
memory busy meanwhile. No number passes through a register.

Tests interpret and lower the kernel; `pallas_kernels.check` runs it where there is a GPU.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_JAX = (0, 11)
_POOLS = 16  # most pools of a kernel: each needs a descriptor among the kernel's parameters
_PROGRAM_BYTES = 64 << 10  # shared memory of a program, so that three share a processor
_PIECE_BYTES = 32 << 10
_LONGEST = 256  # longest axis of a copy
_ALIGNMENT = 128  # bytes, in shared memory
_COLUMN_ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class _Plan:
    """The static parameters of a launch."""

    first_head: int  # first head taken of each pool
    heads: int
    ids: int
    page_size: int
    piece: int  # tokens of a copy
    depth: int  # pieces of a program

    @property
    def pieces(self) -> int:
        """Number of pieces of a pool."""
        return self.heads * self.ids * (self.page_size // self.piece)


def refusal(pool: jax.Array) -> str | None:
    """Say why the kernel does not take pools such as this one, or return None."""
    _, _, page_size, head_dim = pool.shape
    if jax.__version_info__ < _JAX:
        return f"JAX must be {_JAX[0]}.{_JAX[1]} or newer: the kernel writes into what it is given"
    if pool.dtype.itemsize not in (2, 4):
        return f"pages must be of a type of 2 or 4 bytes, not {pool.dtype}"
    row = head_dim * pool.dtype.itemsize
    if row % _COLUMN_ALIGNMENT or head_dim > _LONGEST:
        return (
            f"the head dim must be at most {_LONGEST} and of a multiple of {_COLUMN_ALIGNMENT} "
            f"bytes, not {head_dim} of {pool.dtype}"
        )
    if page_size * row % _ALIGNMENT:
        return f"a page must be of a multiple of {_ALIGNMENT} bytes, not {page_size * row}"
    return None


def _piece(page_size: int, row: int) -> int:
    """Number of tokens of a copy: the most allowed that divide a page."""
    return next(
        tokens
        for tokens in range(min(page_size, _LONGEST, _PIECE_BYTES // row), 0, -1)
        if page_size % tokens == 0 and tokens * row % _ALIGNMENT == 0
    )


def gather(
    arrays: tuple[jax.Array, ...],
    page_ids: jax.Array,
    *,
    heads: slice,
    interpret: Any = None,
) -> jax.Array:
    """See `pallas_kernels.page_copy.api.gather`; arguments are already checked.

    Args:
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
    """
    _, _, page_size, head_dim = arrays[0].shape
    row = head_dim * arrays[0].dtype.itemsize
    piece = _piece(page_size, row)
    plan = _Plan(
        first_head=heads.start,
        heads=heads.stop - heads.start,
        ids=len(page_ids),
        page_size=page_size,
        piece=piece,
        depth=_PROGRAM_BYTES // (piece * row),
    )
    shape = len(arrays) * plan.heads, len(page_ids), *arrays[0].shape[2:]
    pages = lax.empty(shape, arrays[0].dtype)
    for first in range(0, len(arrays), _POOLS):
        group = arrays[first : first + _POOLS]
        pages = _gather(plan, interpret, group, jnp.array([first], jnp.int32), page_ids, pages)
    return pages


@partial(jax.jit, static_argnums=(0, 1))
def _gather(
    plan: _Plan,
    interpret: Any,
    pools: tuple[jax.Array, ...],
    first: jax.Array,
    page_ids: jax.Array,
    pages: jax.Array,
) -> jax.Array:
    """Copy the pages of these pools into `pages`; `first` i32[1] pools come before them.

    It is jitted so that the kernels of a program share one lowering.
    """
    head_dim, dtype = pages.shape[-1], pages.dtype
    kernel = plgpu.kernel(
        partial(_body, plan),
        scratch_types={
            "buffer": plgpu.SMEM((plan.depth, plan.piece, head_dim), dtype),
            "arrived": plgpu.Barrier(num_barriers=plan.depth),
        },
        grid=(len(pools), pl.cdiv(plan.pieces, plan.depth)),
        grid_names=("pool", "program"),
        interpret=interpret,
        kernel_name="gather_pages",
    )
    written = jax.new_ref(pages)
    kernel(*pools, first, page_ids, written)
    return jax.freeze(written)


def _body(plan: _Plan, *refs: Any, buffer: Any, arrived: Any) -> None:
    """
    Args:
      refs: pools [K, P, S, H], first i32[1], page ids i32[Z], pages [A * K', Z, S, H].
      buffer: [depth, piece, H].
      arrived: barriers [depth].
    """
    *pools, first, page_ids, pages = refs
    start = lax.axis_index("program") * plan.depth
    count = jnp.minimum(plan.depth, plan.pieces - start)
    for i, pool in enumerate(pools):
        ends = partial(_ends, plan, pool, page_ids, pages, (first[0] + i) * plan.heads)

        @pl.when(lax.axis_index("pool") == i)
        def _(ends: Any = ends) -> None:
            @pl.loop(0, count)
            def _(at: jax.Array) -> None:
                plgpu.copy_gmem_to_smem(ends(start + at)[0], buffer.at[at], arrived.at[at])

            @pl.loop(0, count)
            def _(at: jax.Array) -> None:
                plgpu.barrier_wait(arrived.at[at])
                plgpu.copy_smem_to_gmem(buffer.at[at], ends(start + at)[1])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _ends(
    plan: _Plan, pool: Any, page_ids: Any, pages: Any, row: jax.Array, index: jax.Array
) -> tuple[Any, Any]:
    """Return source and target of a piece of a pool; the pool's heads begin at `row` of the
    pages."""
    page, part = _divided(index, plan.page_size // plan.piece)
    head, listed = _divided(page, plan.ids)
    tokens = pl.ds(pl.multiple_of(part * plan.piece, plan.piece), plan.piece)
    source = pool.at[plan.first_head + head, page_ids[listed], tokens]
    return source, pages.at[row + head, listed, tokens]


def _divided(x: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))
