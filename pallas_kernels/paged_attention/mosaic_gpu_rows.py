"""The rows that a piece of work of decode attention begins with on Hopper GPUs: the queries of a KV
head, and with `append` the new K and V as the projection returns them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.finite import finite_below
from pallas_kernels.hopper import ROWS, iota, spread
from pallas_kernels.paged_attention.mosaic_gpu_plan import Plan
from pallas_kernels.paged_attention.mosaic_gpu_work import Place, Refs, Turn, Work, each_work, place
from pallas_kernels.quantised import LIMITS


class Rows:
    """Those rows in shared memory, a slot for each piece of work under way.

    Args:
      rows: [slots, 64, H]; in the end a slot may take the result.
      rows_full: barriers [slots].
      angles: f32[slots, 2, H/2], cosine and sine of the rotation.
      tile: [64, H], the rows in the layout of products, or None if no product takes them so.
      new: int8[64, _, H]; two of its rows become the quantised K and V.
      new_scales: f32[64], scales of the same rows.
      poison: f32[64], more than 0 where a row has a number that would not be finite in pages; None
        for quantised pages.
    """

    def __init__(
        self,
        plan: Plan,
        refs: Refs,
        *,
        rows: Any,
        rows_full: Any,
        angles: Any = None,
        tile: Any = None,
        new: Any = None,
        new_scales: Any = None,
        poison: Any = None,
    ) -> None:
        self._plan, self._refs = plan, refs
        self._rows, self._full, self._angles, self._tile = rows, rows_full, angles, tile
        self._new, self.new_scales, self._poison = new, new_scales, poison

    @classmethod
    def take(cls, plan: Plan, refs: Refs, scratch: dict[str, Any], tile: Any = None) -> "Rows":
        """Make the rows; take their shared memory and barriers out of `scratch`."""
        names = ("rows", "rows_full", "angles", "new", "new_scales", "poison")
        return cls(
            plan, refs, tile=tile, **{name: scratch.pop(name) for name in names if name in scratch}
        )

    @staticmethod
    def scratch(plan: Plan, dtype: Any) -> dict[str, Any]:
        """Allocate shared memory and barriers, by the names that `take` expects."""
        scratch: dict[str, Any] = {
            "rows": plgpu.SMEM((plan.slots, ROWS, plan.head_dim), dtype),
            "rows_full": plgpu.Barrier(
                num_arrivals=1 + 2 * plan.append,  # rows, cosine, sine
                num_barriers=plan.slots,
            ),
        }
        if plan.append:
            shape = (plan.slots, 2, plan.head_dim // 2)
            scratch["angles"] = plgpu.SMEM(shape, jnp.float32)
        if plan.append and plan.scaled:
            # Each row is copied alone, and the copy must begin at a multiple of 128 bytes.
            each = max(1, 128 // plan.head_dim)
            scratch["new"] = plgpu.SMEM((ROWS, each, plan.head_dim), jnp.int8)
            scratch["new_scales"] = plgpu.SMEM((ROWS,), jnp.float32)
        elif plan.append:
            scratch["poison"] = plgpu.SMEM((ROWS,), jnp.float32)
        return scratch

    def each(self, do: Callable[[Work, jax.Array, Any], None]) -> None:
        """Call do(work, steps, rows [64, H]) for each piece of work of this program, as in
        `each_work`. The rows are loaded, and with `append` scaled and rotated; the tile, if there
        is one, is filled. With `append` and a tile, a row's later parts have only the tile."""
        plan = self._plan
        if plan.slots > 1:
            first = jnp.int32(0)
            self._fetch(first, place(plan, self._refs, first))

        def take(turn: Turn) -> None:
            if plan.slots > 1:
                pl.when(turn.more)(partial(self._fetch, turn.n + 1, turn.following))
            else:
                self._fetch(turn.n, turn.work)
            slot = lax.rem(turn.n, jnp.int32(plan.slots))
            plgpu.barrier_wait(self._full.at[slot])
            rows = self._rows.at[slot]
            if plan.append:
                self._rotate(turn.work, rows, self._angles.at[slot])
            elif self._tile is not None:
                self._tile[...] = plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)
                plgpu.commit_smem()
            do(turn.work, turn.steps, rows)

        each_work(plan, self._refs, take)

    def _fetch(self, n: jax.Array, here: Place) -> None:
        """Start to load the rows of the n-th piece of work, and their angles, into its slot, once
        an earlier result has left the slot. Rows past them are undefined."""
        plan, refs = self._plan, self._refs
        slot = lax.rem(n, jnp.int32(plan.slots))
        full = self._full.at[slot]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        rows = self._rows.at[slot, pl.ds(0, plan.loaded)]
        plgpu.copy_gmem_to_smem(refs.loaded.at[here.row, here.head], rows, full)
        if plan.append:
            for i, angles in enumerate((refs.cos, refs.sin)):
                plgpu.copy_gmem_to_smem(angles.at[here.row], self._angles.at[slot, i], full)

    def _rotate(self, work: Work, rows: Any, angles: Any) -> None:
        """Scale the rows, rotate those of Q and K, and clear those past V and all rows of an empty
        row, since products read them and 0 times NaN is NaN. K and V for quantised pages become
        whole numbers, which bfloat16 holds exactly. The rows go to the tile, if there is one, and
        back to their slot, if they are read there."""
        plan = self._plan
        half = plan.head_dim // 2
        wide = plgpu.Layout.WGMMA
        row = iota((ROWS, half), 0)
        is_value = row == plan.group + 1
        row_scale = work.row_scale
        assert row_scale is not None
        is_nothing = (row > plan.group + 1) | jnp.full(row.shape, work.kv_len == 0)

        def angle(i: int) -> jax.Array:
            one = plgpu.load(angles.at[i], layout=wide.reduce(0), optimized=False)
            return lax.broadcast_in_dim(one, (ROWS, half), (1,))

        def part(start: int) -> jax.Array:
            ref = rows.at[:, pl.ds(start, half)]
            x = plgpu.load(ref, layout=wide, optimized=False).astype(jnp.float32)
            return jnp.where(is_nothing, jnp.zeros_like(x), x * row_scale)

        a, b, cos, sin = part(0), part(half), angle(0), angle(1)
        turned_a = jnp.where(is_value, a, a * cos - b * sin)
        turned_b = jnp.where(is_value, b, b * cos + a * sin)
        if plan.scaled:
            is_new = (row == plan.group) | is_value
            turned_a, turned_b = self._rounded(is_new, turned_a, turned_b)
        if self._tile is not None:
            both = jnp.concatenate((turned_a, turned_b), axis=1)
            self._tile[...] = both.astype(self._tile.dtype)

        # With a tile only `store_new` reads the rows.
        @pl.when((work.part == 0) | jnp.bool_(self._tile is None))
        def _() -> None:
            halves = turned_a, turned_b
            if not plan.scaled:
                halves = self._guarded(row, *halves)
            put(rows, 0, halves[0])
            put(rows, half, halves[1])

        plgpu.commit_smem()

    def _guarded(self, row: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the halves of rows, [64, H/2], as `store_new` copies them to pages.

        Numbers that are not finite become 0 in the row of V and NaN in that of K. The rows of Q
        become NaN; `store_new` copies the first of them as K where V is not finite, by `poison`.
        (The tile keeps the original numbers, so that the token's own result is not finite.)
        """
        group, below = self._plan.group, finite_below(self._rows.dtype)
        nan = jnp.full_like(a, jnp.nan)
        instead = jnp.where(row == group + 1, jnp.zeros_like(a), nan)
        is_new = (row == group) | (row == group + 1)
        finite = [jnp.abs(x) < below for x in (a, b)]
        is_poison = jnp.where(finite[0] & finite[1], jnp.zeros_like(a), jnp.ones_like(a))
        self._poison[...] = is_poison.sum(axis=1)
        halves = [jnp.where(is_new & x, y, instead) for x, y in zip(finite, (a, b), strict=True)]
        return halves[0], halves[1]

    def _rounded(
        self, is_new: jax.Array, a: jax.Array, b: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Apply `quantised.encode` to rows, given as halves [64, H/2], into `new` and `new_scales`.

        Return the halves, with elements in the new rows.
        """
        limit = LIMITS["int8"]
        # A maximum drops NaNs; a sum keeps them, and 0 times infinity is NaN.
        poison = (a * 0.0 + b * 0.0).sum(axis=1)
        scales = jnp.maximum(jnp.abs(a).max(axis=1), jnp.abs(b).max(axis=1)) / limit + poison
        self.new_scales[...] = scales
        half = self._plan.head_dim // 2
        divisor = spread(jnp.where(scales > 0, scales, jnp.ones_like(scales)), half)
        halves = []
        for start, x in ((0, a), (half, b)):
            elements = lax.round(x / divisor, lax.RoundingMethod.TO_NEAREST_EVEN)
            put(self._new.at[:, 0], start, jnp.clip(elements, -limit, limit))
            halves.append(jnp.where(is_new, elements, x))
        return halves[0], halves[1]

    def store_new(self, work: Work, rows: Any) -> None:
        """Write the new K and V to the slot of the row's newest position, as
        `pallas_kernels.finite` says of pages."""
        plan, refs = self._plan, self._refs
        k, v = refs.rings.k, refs.rings.v
        key, value = plan.group, plan.group + 1

        @pl.when((work.part == 0) & (work.kv_len > 0))
        def _() -> None:
            page = refs.table[work.row, lax.div(work.end, jnp.int32(plan.page_size))]
            offset = lax.rem(work.end, jnp.int32(plan.page_size))
            k_target, v_target = (
                ring.pages.at[work.head, page, pl.ds(offset, 1)] for ring in (k, v)
            )
            if not plan.scaled:
                is_finite = self._poison[value] == 0.0
                for at, copied in ((key, is_finite), (0, ~is_finite)):
                    source = rows.at[pl.ds(at, 1)]
                    pl.when(copied)(partial(plgpu.copy_smem_to_gmem, source, k_target))
                plgpu.copy_smem_to_gmem(rows.at[pl.ds(value, 1)], v_target)
                return
            for at, target in ((key, k_target), (value, v_target)):
                plgpu.copy_smem_to_gmem(self._new.at[at, pl.ds(0, 1)], target)
            # Scales are finite where all numbers are. A scale of 0 makes zeros of any elements.
            k_scale, v_scale = self.new_scales[key], self.new_scales[value]
            is_finite = v_scale < jnp.inf
            k.scales[work.head, page, offset] = jnp.where(is_finite, k_scale, jnp.nan)
            v.scales[work.head, page, offset] = jnp.where(is_finite, v_scale, 0.0)


def put(rows: Any, start: int, x: jax.Array) -> None:
    """Set rows[:, start : start + columns] = x [64, columns], 8 columns at a time.

    Mosaic infers the tiling of shared memory from its slices. From slices of 16 columns or more it
    infers tiles of one row, which it miscompiles (JAX 0.11.2).
    """
    for at in range(0, x.shape[1], 8):
        rows[:, pl.ds(start + at, 8)] = x[:, at : at + 8].astype(rows.dtype)
