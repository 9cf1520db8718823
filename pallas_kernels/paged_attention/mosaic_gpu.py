"""Decode attention as a Mosaic kernel for Hopper GPUs.

Flash-decoding (Dao et al., 2023) over pages, in blocks of threads that stay: each takes one piece of
work after another, a row's share for one KV head, and one of its two warpgroups copies pages into a
ring in shared memory, by the tensor memory accelerator, while the other takes the two products from
it. The ring runs on from one piece of work to the next, so memory never waits for a piece to be
finished or begun. Where there are fewer pieces than processors, a row is cut into parts, and their
results are put together afterwards.

`append_attention` also does what comes before: it takes the projection's output as it is, scales and
rotates it, and writes the new K and V to their page. The new token's own score starts the running
softmax, so nothing that was just written has to be read back.

The queries of a KV head fill few of the 64 rows that a product must have; decode waits for memory
anyway. The tests interpret and lower the kernel; `pallas_kernels.check` runs it where there is a
GPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.online_softmax import LOWEST, MASKED

_ROWS = 64  # of a warpgroup's product
_TILE_ROWS = 8
_BLOCK = 64  # tokens of a stage of the ring
_COLUMNS = 128  # of a product with V, at most: registers hold its result beside the running sums
_OUT_COLUMNS = 64  # of a float32 result on its way out: shared memory is full of pages
_RING_BYTES = 160 << 10
_PROCESSORS = 132  # of an H100 or H200
_LOG2_E = math.log2(math.e)
_NO_SUM = 1e-30  # in place of 0 where a part saw nothing: 0 / it is 0, and its logarithm finite


@dataclass(frozen=True)
class _Plan:
    """What is known of a launch before it is traced."""

    rows: int
    kv_heads: int
    group: int
    head_dim: int
    width: int  # entries of a row of the page table
    page_size: int
    parts: int  # pieces of work that share a row and a KV head
    programs: int
    append: bool
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None

    @property
    def piece(self) -> int:
        """Tokens of one copy: a page, or what a block takes of a longer one."""
        return min(self.page_size, _BLOCK)

    @property
    def stages(self) -> int:
        """Of the ring; a stage holds a block of K and of V."""
        return max(2, min(8, _RING_BYTES // (4 * _BLOCK * self.head_dim)))

    @property
    def slots(self) -> int:
        """For the queries of a piece of work, so that the next one's are there when it begins."""
        return 1 if self.head_dim > 128 or self.parts > 1 else 2

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
        """Queries that make a copy of a float32 for each a multiple of 16 bytes."""
        return -self.group % 4

    @property
    def work(self) -> int:
        """Pieces of work."""
        return self.rows * self.kv_heads * self.parts


def refusal(q: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str | None:
    """Why `paged_attention` does not take these arguments, or None."""
    del page_table
    return _refusal(q.dtype, q.shape[1] // k_pages.shape[0], k_pages)


def append_refusal(qkv: jax.Array, k_pages: jax.Array, page_table: jax.Array) -> str | None:
    """Why `append_attention` does not take these arguments, or None."""
    del page_table
    return _refusal(qkv.dtype, qkv.shape[2] - 2, k_pages)


def _refusal(dtype: Any, group: int, k_pages: jax.Array) -> str | None:
    _, _, page_size, head_dim = k_pages.shape
    if dtype not in (jnp.bfloat16, jnp.float16) or k_pages.dtype != dtype:
        return f"q and pages must both be bfloat16 or float16, not {dtype} and {k_pages.dtype}"
    if page_size not in (8, 16, 32) and page_size % _BLOCK:
        return f"the page size must be 8, 16, 32 or a multiple of {_BLOCK}, not {page_size}"
    if head_dim not in (64, 128, 256):
        return f"the head dim must be 64, 128 or 256, not {head_dim}"
    if group > _ROWS - 2:
        return f"a KV head may have at most {_ROWS - 2} query heads, not {group}"
    return None


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
    parts: int | None = None,
    programs: int = _PROCESSORS,
    interpret: Any = None,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.api.paged_attention`; arguments are taken as checked.

    Args:
      parts: pieces of work that share a row and a KV head; None chooses.
      programs: blocks of threads, at most.
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
    """
    rows, heads, head_dim = q.shape
    kv_heads = k_pages.shape[0]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    plan = _make_plan(
        grouped, k_pages, page_table, parts, programs, False, scale, logit_soft_cap, sliding_window
    )
    return _read(plan, interpret, grouped, k_pages, v_pages, page_table, kv_lens)


def append_attention(
    qkv: jax.Array,
    row_scale: jax.Array,
    bias: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
    parts: int | None = None,
    programs: int = _PROCESSORS,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention.api.append_attention`; arguments are taken as checked.

    Args:
      parts, programs, interpret: as in `paged_attention`.
    """
    if bias is not None:
        qkv = (qkv * row_scale[:, None, None, None] + bias).astype(qkv.dtype)
        row_scale = jnp.ones_like(row_scale)
    plan = _make_plan(
        qkv, k_pages, page_table, parts, programs, True, scale, logit_soft_cap, sliding_window
    )
    operands = (qkv, k_pages, v_pages, page_table, kv_lens, row_scale, cos, sin)
    return _append(plan, interpret, *operands)


def _make_plan(
    loaded: jax.Array,
    k_pages: jax.Array,
    page_table: jax.Array,
    parts: int | None,
    programs: int,
    append: bool,
    scale: float,
    logit_soft_cap: float | None,
    sliding_window: int | None,
) -> _Plan:
    rows, kv_heads, loaded_rows, head_dim = loaded.shape
    page_size, width = k_pages.shape[2], page_table.shape[1]
    blocks = pl.cdiv(width * page_size, _BLOCK)
    if parts is None:
        # As many as still run at once, one to a processor, and no more than there are blocks.
        parts = max(1, min(programs // (rows * kv_heads), blocks))
    return _Plan(
        rows=rows,
        kv_heads=kv_heads,
        group=loaded_rows - 2 * append,
        head_dim=head_dim,
        width=width,
        page_size=page_size,
        parts=parts,
        programs=min(programs, rows * kv_heads * parts),
        append=append,
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
    )


# Functions of their own, so that a model's layers share one lowering: it takes a second.


@partial(jax.jit, static_argnums=(0, 1))
def _read(plan: _Plan, interpret: Any, q: jax.Array, *operands: jax.Array) -> jax.Array:
    return _put_together(plan, _launch(plan, interpret, q, *operands), q.dtype)


@partial(jax.jit, static_argnums=(0, 1))
def _append(
    plan: _Plan,
    interpret: Any,
    qkv: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *operands: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # Mutable, so that the kernel writes into the pools it is given.
    pools = jax.new_ref(k_pages), jax.new_ref(v_pages)
    out = _put_together(plan, _launch(plan, interpret, qkv, *pools, *operands), qkv.dtype)
    return out, jax.freeze(pools[0]), jax.freeze(pools[1])


def _launch(plan: _Plan, interpret: Any, loaded: jax.Array, *operands: Any) -> Any:
    """[B, K, G, H] of one part, or of several float32[B, K, parts, G, H] and log2 of the sums of
    their weights, f32[B, K, parts, G] with G padded."""
    shape = (plan.rows, plan.kv_heads, plan.group, plan.head_dim)
    split = (*shape[:2], plan.parts, *shape[2:])
    whole = (jax.ShapeDtypeStruct(shape, loaded.dtype),)
    in_parts = (
        jax.ShapeDtypeStruct(split, jnp.float32),
        jax.ShapeDtypeStruct((*split[:3], plan.group + plan.padding), jnp.float32),
    )
    kernel = plgpu.kernel(
        partial(_body, plan),
        out_type=whole if plan.parts == 1 else in_parts,
        scratch_types=_scratch(plan, loaded.dtype),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="append_attention" if plan.append else "paged_attention",
    )
    return kernel(loaded, *operands)


def _put_together(plan: _Plan, out: Any, dtype: Any) -> jax.Array:
    """[B, N, H] of the parts' results.

    Written without a reduction, so that XLA makes one kernel of it.
    """
    heads = (plan.rows, plan.kv_heads * plan.group, plan.head_dim)
    if plan.parts == 1:
        return out[0].reshape(heads)
    values, log_totals = (
        [x[:, :, part, : plan.group] for part in range(plan.parts)]
        for x in (out[0], out[1][..., None])
    )
    highest = log_totals[0]
    for other in log_totals[1:]:
        highest = jnp.maximum(highest, other)
    weights = [jnp.exp2(log_total - highest) for log_total in log_totals]
    weighted = sum(value * weight for value, weight in zip(values, weights, strict=True))
    return (weighted / sum(weights)).reshape(heads).astype(dtype)


def _scratch(plan: _Plan, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers, by `_body`'s names for them."""

    def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
        """In the layout of the products: swizzled tiles of 8 rows of 128 bytes."""
        columns = 128 // jnp.dtype(dtype).itemsize
        tiles = plgpu.TilingTransform((_TILE_ROWS, columns))  # type: ignore[abstract]
        swizzle = plgpu.SwizzleTransform(128)  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=(tiles, swizzle))

    ring = tiled((plan.stages, _BLOCK, plan.head_dim), dtype)
    full = plgpu.Barrier(num_arrivals=_BLOCK // plan.piece, num_barriers=plan.stages)
    free = plgpu.Barrier(num_arrivals=1, num_barriers=plan.stages)
    scratch = {
        "rows": plgpu.SMEM((plan.slots, _ROWS, plan.head_dim), dtype),
        "q_tile": tiled((_ROWS, plan.head_dim), dtype),
        "weights": tiled((_ROWS, _BLOCK), dtype),
        "k_buffer": ring,
        "v_buffer": ring,
        "rows_full": plgpu.Barrier(num_barriers=plan.slots),
        "k_full": full,
        "v_full": full,
        "k_free": free,
        "v_free": free,
    }
    if plan.parts > 1:
        scratch["out_tile"] = plgpu.SMEM((_ROWS, _OUT_COLUMNS), jnp.float32)
        scratch["log_total"] = plgpu.SMEM((_ROWS,), jnp.float32)
    return scratch


@dataclass(frozen=True)
class _Ring:
    """Pages of K or of V on their way through shared memory."""

    pages: Any  # [K, P, S, H], global
    buffer: Any  # [stages, C, H], shared
    full: Any  # barriers [stages]: the copies into a stage have arrived
    free: Any  # barriers [stages]: the product has read a stage


@dataclass(frozen=True)
class _Refs:
    """The operands of a launch; those of `append` alone may be missing."""

    loaded: Any  # [B, K, G, H] queries, or [B, K, G + 2, H] with K and V
    table: Any  # i32[B, W]
    lens: Any  # i32[B]
    k: _Ring
    v: _Ring
    row_scale: Any = None  # f32[B]
    cos: Any = None  # f32[B, H/2]
    sin: Any = None  # f32[B, H/2]


@dataclass(frozen=True)
class _Work:
    """A piece of work: the blocks of a row's pages that are read for one KV head."""

    row: jax.Array
    head: jax.Array
    part: jax.Array
    kv_len: jax.Array
    oldest: jax.Array  # position of the first visible token
    end: jax.Array  # position behind the last one that is in the pages
    first: jax.Array  # block
    count: jax.Array  # of blocks


def _body(plan: _Plan, loaded: Any, k_pages: Any, v_pages: Any, *refs: Any, **scratch: Any) -> None:
    inputs, outputs = (refs[:5], refs[5:]) if plan.append else (refs[:2], refs[2:])
    buffers = {
        kind: (scratch.pop(f"{kind}_buffer"), scratch.pop(f"{kind}_full"), scratch.pop(f"{kind}_free"))
        for kind in "kv"
    }
    table, lens, *rest = inputs
    operands = _Refs(
        loaded, table, lens, _Ring(k_pages, *buffers["k"]), _Ring(v_pages, *buffers["v"]), *rest
    )

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy_pages(plan, operands)

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        _compute(plan, operands, outputs, **scratch)


def _each_work(plan: _Plan, refs: _Refs, do: Callable[[jax.Array, _Work, jax.Array], None]) -> Any:
    """Calls do(n, work, steps) for the n-th piece of work of this program; `steps` counts the blocks
    of those before. Returns that of all of them."""
    program = lax.axis_index("program")

    def turn(n: jax.Array, steps: jax.Array) -> jax.Array:
        work = _work(plan, refs, program + n * plan.programs)
        do(n, work, steps)
        return steps + work.count

    mine = lax.div(plan.work - program + plan.programs - 1, jnp.int32(plan.programs))
    return lax.fori_loop(0, mine, turn, jnp.int32(0))


def _work(plan: _Plan, refs: _Refs, index: jax.Array) -> _Work:
    """Splits a row's blocks evenly; the last parts of a short row may get none."""
    part = lax.rem(index, jnp.int32(plan.parts))
    head = lax.rem(lax.div(index, jnp.int32(plan.parts)), jnp.int32(plan.kv_heads))
    row = lax.div(index, jnp.int32(plan.parts * plan.kv_heads))
    kv_len = refs.lens[row]
    window = plan.sliding_window
    oldest = jnp.int32(0) if window is None else jnp.maximum(kv_len - window, 0)
    end = jnp.maximum(kv_len - 1, 0) if plan.append else kv_len
    start = lax.div(oldest, jnp.int32(_BLOCK))
    stop = lax.div(end + (_BLOCK - 1), jnp.int32(_BLOCK))
    each = lax.div(jnp.maximum(stop - start, 0) + (plan.parts - 1), jnp.int32(plan.parts))
    first = start + part * each
    return _Work(row, head, part, kv_len, oldest, end, first, jnp.clip(stop - first, 0, each))


class _Seen(NamedTuple):
    """The running softmax of a piece of work, float32."""

    weighted: tuple[jax.Array, ...]  # of [64, columns]: the sum of weight * value
    highest: jax.Array  # [64], base-2 score
    total: jax.Array  # [64], the sum of weights


# The warpgroup that copies.


def _copy_pages(plan: _Plan, refs: _Refs) -> None:
    rings = (refs.k, refs.v)

    def copy_work(n: jax.Array, work: _Work, steps: jax.Array) -> None:
        del n

        @pl.loop(0, work.count)
        def _(i: jax.Array) -> None:
            stage = lax.rem(steps + i, jnp.int32(plan.stages))
            for ring in rings:
                reused = steps + i >= plan.stages
                pl.when(reused)(partial(plgpu.barrier_wait, ring.free.at[stage]))
                for at in range(0, _BLOCK, plan.piece):
                    token = (work.first + i) * _BLOCK + at
                    entry = lax.div(token, jnp.int32(plan.page_size))
                    # A block may reach past the table; what it reads there is masked.
                    page = refs.table[work.row, jnp.minimum(entry, plan.width - 1)]
                    start = pl.multiple_of(lax.rem(token, jnp.int32(plan.page_size)), plan.piece)
                    plgpu.copy_gmem_to_smem(
                        ring.pages.at[work.head, page, pl.ds(start, plan.piece)],
                        ring.buffer.at[stage, pl.ds(at, plan.piece)],
                        ring.full.at[stage],
                    )

    steps = _each_work(plan, refs, copy_work)
    # Every arrival must be observed before the barriers go out of scope.
    for t in range(plan.stages):
        stage = lax.rem(steps + t, jnp.int32(plan.stages))
        for ring in rings:
            used = steps + t >= plan.stages
            pl.when(used)(partial(plgpu.barrier_wait, ring.free.at[stage]))


# The warpgroup that computes.


def _compute(
    plan: _Plan,
    refs: _Refs,
    outputs: tuple[Any, ...],
    *,
    rows: Any,  # [slots, 64, H]: what a piece of work begins with, then its K and V, then its result
    q_tile: Any,  # [64, H], as a product takes it
    weights: Any,  # [64, C], likewise
    rows_full: Any,  # barriers [slots]
    out_tile: Any = None,  # f32[64, columns]
    log_total: Any = None,  # f32[64]
) -> None:
    def fetch(n: jax.Array, index: jax.Array) -> None:
        """Begin to load the rows of the n-th piece of work into its slot, once what a former one
        left there has gone out. What is past them is undefined."""
        slot = lax.rem(n, jnp.int32(plan.slots))
        head = lax.rem(lax.div(index, jnp.int32(plan.parts)), jnp.int32(plan.kv_heads))
        row = lax.div(index, jnp.int32(plan.parts * plan.kv_heads))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(
            refs.loaded.at[row, head], rows.at[slot, pl.ds(0, plan.loaded)], rows_full.at[slot]
        )

    program = lax.axis_index("program")
    if plan.slots > 1:
        fetch(jnp.int32(0), program)

    def compute_work(n: jax.Array, work: _Work, steps: jax.Array) -> None:
        index = program + n * plan.programs
        if plan.slots > 1:
            following = index + plan.programs
            pl.when(following < plan.work)(partial(fetch, n + 1, following))
        else:
            fetch(n, index)
        slot = lax.rem(n, jnp.int32(plan.slots))
        mine = rows.at[slot]
        plgpu.barrier_wait(rows_full.at[slot])
        if plan.append:
            _rotate(plan, refs, work, mine)
        q_tile[...] = plgpu.load(mine, layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.commit_smem()
        seen = _begin(plan, work, q_tile, weights)
        if plan.append:
            _store_new(plan, refs, work, mine)
        weighted, highest, total = _attend(plan, refs, work, steps, q_tile, weights, seen)
        total = jnp.maximum(total, _NO_SUM)
        out = [x / _spread(total, x.shape[1]) for x in weighted]
        if plan.parts == 1:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the new K and V
            for columns, x in zip(plan.columns, out, strict=True):
                _put(mine, columns.start, x)
            plgpu.commit_smem()
            result = mine.at[pl.ds(0, plan.group)]
            plgpu.copy_smem_to_gmem(result, outputs[0].at[work.row, work.head])
        else:
            log_total[...] = highest + jnp.log(total) * _LOG2_E
            _store_part(plan, work, outputs, out, out_tile, log_total)

    _each_work(plan, refs, compute_work)
    plgpu.wait_smem_to_gmem(0)


def _put(rows: Any, start: int, x: jax.Array) -> None:
    """rows[:, start : start + columns] = x [64, columns], 8 columns at a time.

    Mosaic infers how shared memory is tiled from how it is sliced, and miscompiles the tiles of one
    row that it finds where slices are of 16 columns or more (JAX 0.11.2).
    """
    for at in range(0, x.shape[1], 8):
        rows[:, pl.ds(start + at, 8)] = x[:, at : at + 8].astype(rows.dtype)


def _rotate(plan: _Plan, refs: _Refs, work: _Work, rows: Any) -> None:
    """Scales the rows, rotates those of Q and K, and clears those past V."""
    half = plan.head_dim // 2
    wide = plgpu.Layout.WGMMA
    row = _iota((_ROWS, half), 0)
    is_value, is_nothing = row == plan.group + 1, row > plan.group + 1
    scale = refs.row_scale[work.row]

    def angle(ref: Any) -> jax.Array:
        one = plgpu.load(ref.at[work.row], layout=wide.reduce(0), optimized=False)
        return lax.broadcast_in_dim(one, (_ROWS, half), (1,))

    def part(start: int) -> jax.Array:
        ref = rows.at[:, pl.ds(start, half)]
        x = plgpu.load(ref, layout=wide, optimized=False).astype(jnp.float32)
        return jnp.where(is_nothing, jnp.zeros_like(x), x * scale)

    a, b, cos, sin = part(0), part(half), angle(refs.cos), angle(refs.sin)
    turned_a = jnp.where(is_value, a, a * cos - b * sin)
    turned_b = jnp.where(is_value, b, b * cos + a * sin)
    _put(rows, 0, turned_a)
    _put(rows, half, turned_b)
    plgpu.commit_smem()


def _store_new(plan: _Plan, refs: _Refs, work: _Work, rows: Any) -> None:
    """The new K and V go to the slot of the row's newest position."""

    @pl.when((work.part == 0) & (work.kv_len > 0))
    def _() -> None:
        page = refs.table[work.row, lax.div(work.end, jnp.int32(plan.page_size))]
        offset = lax.rem(work.end, jnp.int32(plan.page_size))
        for ring, at in ((refs.k, plan.group), (refs.v, plan.group + 1)):
            target = ring.pages.at[work.head, page, pl.ds(offset, 1)]
            plgpu.copy_smem_to_gmem(rows.at[pl.ds(at, 1)], target)


def _begin(plan: _Plan, work: _Work, q_tile: Any, weights: Any) -> _Seen:
    """The running softmax before the first block. With `append` the first part has seen the new
    token, whose K and V are rows of `q_tile`: products with the tile itself find its score, and its
    V times a weight of 1."""
    wide, tall = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    nothing = _Seen(
        weighted=tuple(
            plgpu.layout_cast(jnp.zeros((_ROWS, at.stop - at.start), jnp.float32), wide)
            for at in plan.columns
        ),
        highest=plgpu.layout_cast(jnp.full((_ROWS,), LOWEST, jnp.float32), tall),
        total=plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), tall),
    )
    if not plan.append:
        return nothing
    column = _iota((_ROWS, _BLOCK), 1)
    mine = jnp.full((_ROWS, _BLOCK), (work.part == 0) & (work.kv_len > 0))
    scores = _base_two(plan, _product(q_tile, q_tile.transpose((1, 0)), _BLOCK))
    scores = jnp.where(mine & (column == plan.group), scores, MASKED)
    weight = jnp.where(
        mine & (column == plan.group + 1), jnp.ones_like(scores), jnp.zeros_like(scores)
    )
    weights[...] = weight.astype(weights.dtype)
    plgpu.commit_smem()
    return _Seen(
        weighted=tuple(
            _product(weights, q_tile.at[:, at], at.stop - at.start) for at in plan.columns
        ),
        highest=jnp.maximum(scores.max(axis=1), nothing.highest),
        total=weight.sum(axis=1),
    )


def _attend(
    plan: _Plan,
    refs: _Refs,
    work: _Work,
    steps: jax.Array,
    q_tile: Any,
    weights: Any,
    seen: _Seen,
) -> _Seen:
    """What has been seen after the blocks of `work`."""
    k, v = refs.k, refs.v

    def visible(shape: tuple[int, int], axis: int, block: jax.Array) -> jax.Array:
        token = _iota(shape, axis) + block * _BLOCK
        return (work.oldest <= token) & (token < work.end)

    def step(i: jax.Array, seen: _Seen) -> _Seen:
        stage, block = lax.rem(steps + i, jnp.int32(plan.stages)), work.first + i

        plgpu.barrier_wait(k.full.at[stage])
        scores = _product(q_tile, k.buffer.at[stage].transpose((1, 0)), _BLOCK)
        plgpu.barrier_arrive(k.free.at[stage])
        scores = jnp.where(visible((_ROWS, _BLOCK), 1, block), _base_two(plan, scores), MASKED)
        higher = jnp.maximum(seen.highest, scores.max(axis=1))
        fade = jnp.exp2(seen.highest - higher)
        weight = jnp.exp2(scores - _spread(higher, _BLOCK))
        weights[...] = weight.astype(weights.dtype)
        plgpu.commit_smem()
        total = seen.total * fade + weight.sum(axis=1)

        plgpu.barrier_wait(v.full.at[stage])
        ragged = (block * _BLOCK < work.oldest) | ((block + 1) * _BLOCK > work.end)

        @pl.when(ragged)
        def _() -> None:
            # A weight of 0 does not silence a NaN, and unread memory may hold one.
            rows = v.buffer[stage]
            shown = visible((_BLOCK, plan.head_dim), 0, block)
            v.buffer[stage] = jnp.where(shown, rows, jnp.zeros_like(rows))
            plgpu.commit_smem()

        weighted = tuple(
            x * _spread(fade, x.shape[1]) + _product(weights, v.buffer.at[stage, :, at], x.shape[1])
            for x, at in zip(seen.weighted, plan.columns, strict=True)
        )
        plgpu.barrier_arrive(v.free.at[stage])
        return _Seen(weighted, higher, total)

    return lax.fori_loop(0, work.count, step, seen)


def _store_part(
    plan: _Plan,
    work: _Work,
    outputs: tuple[Any, ...],
    out: list[jax.Array],
    out_tile: Any,
    log_total: Any,
) -> None:
    """A part's float32 result, a few columns at a time."""
    place = (work.row, work.head, work.part)
    for columns, x in zip(plan.columns, out, strict=True):
        for start in range(0, x.shape[1], _OUT_COLUMNS):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_tile[...] = x[:, start : start + _OUT_COLUMNS]
            plgpu.commit_smem()
            at = pl.ds(columns.start + start, _OUT_COLUMNS)
            result = outputs[0].at[(*place, slice(None), at)]
            plgpu.copy_smem_to_gmem(out_tile.at[pl.ds(0, plan.group)], result)
    padded = pl.ds(0, plan.group + plan.padding)
    plgpu.copy_smem_to_gmem(log_total.at[padded], outputs[1].at[place])


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _spread(x: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (_ROWS, columns), (0,))


def _product(a: Any, b: Any, columns: int) -> jax.Array:
    """float32[64, columns] of two tiles in shared memory."""

    def multiply(into: Any) -> jax.Array:
        plgpu.wgmma(into, a, b)
        return into[...]

    into = plgpu.ACC((_ROWS, columns), jnp.float32)  # type: ignore[attr-defined]
    return pl.run_scoped(multiply, into)


def _base_two(plan: _Plan, scores: jax.Array) -> jax.Array:
    """Scores whose exp2 is what exp is of the scaled and capped ones."""
    cap = plan.logit_soft_cap
    if cap is None:
        return scores * (plan.scale * _LOG2_E)
    return jnp.tanh(scores * (plan.scale / cap)) * (cap * _LOG2_E)
