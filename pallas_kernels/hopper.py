"""Shared parts of the kernels for Hopper GPUs: tiles in shared memory, their products, and rings
that pages are copied into.

A kernel's warpgroups share two rings, one of K and one of V. One warpgroup copies pages into them
with the tensor memory accelerator, a block of tokens to a stage. The others wait until a stage is
full, take their products from it, and free it. The count of stages continues from one piece of work
to the next.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # rows of a warpgroup's product
PROCESSORS = 132  # streaming multiprocessors of an H100 or H200
LOG2_E = math.log2(math.e)

_TILE_ROWS = 8
_TILE_BYTES = 128  # bytes of a row of a tile


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Allocate shared memory in the layout of the products: swizzled tiles of 8 rows of 128 bytes,
    or of a shorter row's bytes."""
    size = jnp.dtype(dtype).itemsize
    row = min(_TILE_BYTES, shape[-1] * size)
    tiles = plgpu.TilingTransform((_TILE_ROWS, row // size))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(row)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiles, swizzle))


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    """Return each element's index along the axis, i32, in the layout of the products."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def spread(x: jax.Array, columns: int) -> jax.Array:
    """Broadcast x [64] to [64, columns]."""
    return lax.broadcast_in_dim(x, (ROWS, columns), (0,))


def product(a: Any, b: Any, columns: int) -> jax.Array:
    """Multiply two tiles in shared memory: float32[64, columns]."""

    def multiply(into: Any) -> jax.Array:
        plgpu.wgmma(into, a, b)
        return into[...]

    into = plgpu.ACC((ROWS, columns), jnp.float32)  # type: ignore[attr-defined]
    return pl.run_scoped(multiply, into)


def accumulate(sums: jax.Array, a: jax.Array, b: Any) -> jax.Array:
    """Return sums + a @ b, float32[64, columns], with a in registers. Pallas' interpreter takes a
    from shared memory only."""

    def multiply(into: Any) -> None:
        plgpu.wgmma(into, a, b)

    return pl.run_state(multiply)(plgpu.ACC.init(sums))  # type: ignore[attr-defined]


def base_two(scores: jax.Array, scale: float, logit_soft_cap: float | None) -> jax.Array:
    """Scale and cap scores so that their exp2 equals the exp of the scaled and capped scores."""
    if logit_soft_cap is None:
        return scores * (scale * LOG2_E)
    return jnp.tanh(scores * (scale / logit_soft_cap)) * (logit_soft_cap * LOG2_E)


@dataclass(frozen=True)
class Ring:
    """A ring in shared memory for pages of K or of V."""

    pages: Any  # [K, P, S, H], global
    buffer: Any  # [stages, C, H], shared
    full: Any  # barriers [stages]: the copies into a stage have arrived
    free: Any  # barriers [stages]: every reader is done with a stage
    scales: Any = None  # f32[K, P, S], global; None unless pages are quantised
    scale_buffer: Any = None  # f32[stages, C], shared


@dataclass(frozen=True)
class Rings:
    """The two rings of a kernel, used in step."""

    k: Ring
    v: Ring

    @staticmethod
    def scratch(
        dtype: Any,
        *,
        stages: int,
        block: int,
        head_dim: int,
        page_size: int,
        readers: int,
        scaled: bool = False,
    ) -> dict[str, Any]:
        """Allocate shared memory and barriers, by the names that `take` expects.

        Args:
          block: tokens of a stage.
          readers: warpgroups that free a stage.
          scaled: whether pages are quantised, so that scales are copied, too.
        """
        buffer = tiled((stages, block, head_dim), dtype)
        copies = (1 + scaled) * block // _piece(block, page_size)
        full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
        free = plgpu.Barrier(num_arrivals=readers, num_barriers=stages)
        parts = {"buffer": buffer, "full": full, "free": free}
        if scaled:
            parts["scale_buffer"] = plgpu.SMEM((stages, block), jnp.float32)
        return {f"{kind}_{part}": x for kind in "kv" for part, x in parts.items()}

    @staticmethod
    def take(
        k_pages: Any, v_pages: Any, scratch: dict[str, Any], scales: tuple[Any, ...] = ()
    ) -> "Rings":
        """Make the rings of these pools; take their shared memory and barriers out of `scratch`.

        `scales` are those of K and of V, if they have any.
        """
        parts = ("buffer", "full", "free", *(("scale_buffer",) if scales else ()))
        k, v = (
            Ring(pages, scales=own, **{part: scratch.pop(f"{kind}_{part}") for part in parts})
            for kind, pages, own in zip(
                "kv", (k_pages, v_pages), scales or (None, None), strict=True
            )
        )
        return Rings(k, v)

    def copy(
        self,
        head: jax.Array,
        first: jax.Array,
        count: jax.Array,
        steps: jax.Array,
        page_of: Callable[[jax.Array], jax.Array],
    ) -> None:
        """Copy blocks of a KV head, each as soon as its stage is free.

        Args:
          first, count: the first block and the number of blocks.
          steps: number of blocks copied before.
          page_of: returns the page at an index of the sequence's list, even beyond its end: the
            last block may reach past the list; tokens read there are masked.
        """
        stages, block = self.k.buffer.shape[:2]
        page_size = self.k.pages.shape[2]
        piece = _piece(block, page_size)

        @pl.loop(0, count)
        def _(i: jax.Array) -> None:
            stage = lax.rem(steps + i, jnp.int32(stages))
            for ring in (self.k, self.v):
                reused = steps + i >= stages
                pl.when(reused)(partial(plgpu.barrier_wait, ring.free.at[stage]))
                for at in range(0, block, piece):
                    token = (first + i) * block + at
                    page = page_of(lax.div(token, jnp.int32(page_size)))
                    start = pl.multiple_of(lax.rem(token, jnp.int32(page_size)), piece)
                    tokens, place = (head, page, pl.ds(start, piece)), (stage, pl.ds(at, piece))
                    full = ring.full.at[stage]
                    plgpu.copy_gmem_to_smem(ring.pages.at[tokens], ring.buffer.at[place], full)
                    if ring.scales is not None:
                        plgpu.copy_gmem_to_smem(
                            ring.scales.at[tokens], ring.scale_buffer.at[place], full
                        )

    def drain(self, steps: jax.Array) -> None:
        """Wait for the last reads after `steps` blocks in all: every arrival must be observed
        before the barriers go out of scope."""
        stages = self.k.buffer.shape[0]
        for t in range(stages):
            stage = lax.rem(steps + t, jnp.int32(stages))
            for ring in (self.k, self.v):
                used = steps + t >= stages
                pl.when(used)(partial(plgpu.barrier_wait, ring.free.at[stage]))


def _piece(block: int, page_size: int) -> int:
    """Number of tokens of one copy: a page, or the part of a longer page that fits a block."""
    return min(page_size, block)
