"""Prefill attention over pages as a Mosaic kernel for Hopper GPUs.

FlashAttention-3 (Shah et al., 2024) on ragged, paged input. A piece of work is what one sequence has
of a tile of 128 tokens of the batch, for one query head: one warpgroup copies that head's pages into a ring in
shared memory, by the tensor memory accelerator, and two others take half of the tile each, in turns:
while one keeps the tensor cores busy, the other takes its softmax.

Blocks of threads stay: each takes one piece of work after another, and its ring runs on from one to
the next. Pieces are dealt out long ones first and back and forth, which evens out what the causal
mask makes uneven.

The tests interpret and lower the kernel; `pallas_kernels.check` runs it where there is a GPU.
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
_TILE = 2 * _ROWS  # tokens of a piece of work
_BLOCK = 128  # tokens of a stage of the ring
_PROCESSORS = 132  # of an H100 or H200
_COMPUTE = 2  # warpgroups
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class _Plan:
    """What is known of a launch before it is traced."""

    heads: int
    group: int
    head_dim: int
    page_size: int
    listed_pages: int
    tiles: int
    programs: int
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None
    weights_in_registers: bool
    """As they should be; Pallas' interpreter takes them from shared memory alone."""

    @property
    def piece(self) -> int:
        """Tokens of one copy: a page, or what a block takes of a longer one."""
        return min(self.page_size, _BLOCK)

    @property
    def stages(self) -> int:
        """Of the ring; a stage holds a block of K and of V."""
        return 2 if self.head_dim == 128 else 4

    @property
    def work(self) -> int:
        """Pieces of work."""
        return self.tiles * self.heads


def refusal(q: jax.Array, k_pages: jax.Array, kv_pages: jax.Array) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    del kv_pages
    _, _, page_size, head_dim = k_pages.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k_pages.dtype != q.dtype:
        return f"q and pages must both be bfloat16 or float16, not {q.dtype} and {k_pages.dtype}"
    if page_size not in (8, 16, 32, 64) and page_size % _BLOCK:
        return f"the page size must be 8, 16, 32, 64 or a multiple of {_BLOCK}, not {page_size}"
    if head_dim not in (64, 128):
        return f"the head dim must be 64 or 128, not {head_dim}"
    return None


def prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    kv_pages: jax.Array,
    cu_pages: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
    sliding_window: int | None = None,
    programs: int = _PROCESSORS,
    interpret: Any = None,
) -> jax.Array:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`; arguments are taken as checked.

    Args:
      programs: blocks of threads, at most.
      interpret: `plgpu.InterpretGPUParams()` to run in Pallas' interpreter, on the CPU.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, _, page_size, _ = k_pages.shape
    padding = -tokens % _TILE
    tiles = (tokens + padding) // _TILE + kv_lens.shape[0]
    plan = _Plan(
        heads=heads,
        group=heads // kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        listed_pages=kv_pages.shape[0],
        tiles=tiles,
        programs=min(programs, tiles * heads),
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
        weights_in_registers=interpret is None,
    )
    padded = jnp.pad(q, ((0, padding), (0, 0), (0, 0))) if padding else q
    tile_table = _tile_table(tiles, padded.shape[0], cu_pages, cu_q_lens, kv_lens)
    return _launch(plan, interpret, padded, k_pages, v_pages, kv_pages, tile_table)[:tokens]


def _tile_table(
    tiles: int, tokens: int, cu_pages: jax.Array, cu_q_lens: jax.Array, kv_lens: jax.Array
) -> jax.Array:
    """i32[tiles, 5] of what each sequence has of each tile, longest context first: the tile's first
    token, first row and last row + 1 of the sequence in it, position of row 0, and where the
    sequence's pages begin in the list. Rows that pad the batch are those of a last sequence without
    context; pieces that do not exist have no rows.

    Every layer of a model asks for the same table, which XLA then computes once.
    """
    starts = cu_q_lens
    ends = jnp.append(cu_q_lens[1:], tokens)
    context = jnp.append(kv_lens - (cu_q_lens[1:] - cu_q_lens[:-1]), -tokens)
    pages = cu_pages
    first = starts // _TILE
    counts = jnp.where(ends > starts, (ends - 1) // _TILE + 1 - first, 0)
    through = jnp.cumsum(counts)
    piece = jnp.arange(tiles, dtype=jnp.int32)
    b = jnp.minimum(jnp.searchsorted(through, piece, side="right"), starts.shape[0] - 1)
    token = (first[b] + piece - (through[b] - counts[b])) * _TILE
    exists = piece < through[-1]
    begin = jnp.clip(starts[b] - token, 0, _TILE)
    end = jnp.where(exists, jnp.clip(ends[b] - token, 0, _TILE), begin)
    position = token - starts[b] + context[b]
    table = jnp.stack([jnp.where(exists, token, 0), begin, end, position, pages[b]], axis=1)
    longest_first = jnp.argsort(-jnp.where(exists, position + end, -2 * tokens))
    return table[longest_first].astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1))
def _launch(plan: _Plan, interpret: Any, q: jax.Array, *operands: jax.Array) -> jax.Array:
    """A function of its own, so that a model's layers share one lowering: it takes a second."""
    kernel = plgpu.kernel(
        partial(_body, plan),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_scratch(plan, q.dtype),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="prefill_attention",
    )
    return kernel(q, *operands)


def _scratch(plan: _Plan, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers, by `_body`'s names for them."""

    def tiled(*shape: int) -> Any:
        """In the layout of the products: swizzled tiles of 8 rows of 128 bytes."""
        tiles = plgpu.TilingTransform((8, 64))  # type: ignore[abstract]
        swizzle = plgpu.SwizzleTransform(128)  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=(tiles, swizzle))

    ring = tiled(plan.stages, _BLOCK, plan.head_dim)
    full = plgpu.Barrier(num_arrivals=_BLOCK // plan.piece, num_barriers=plan.stages)
    free = plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=plan.stages)
    scratch = {
        "q_tiles": tiled(_COMPUTE, _ROWS, plan.head_dim),
        "out_tiles": plgpu.SMEM((_COMPUTE, _ROWS, plan.head_dim), dtype),
        "k_buffer": ring,
        "v_buffer": ring,
        "q_full": plgpu.Barrier(num_barriers=_COMPUTE),
        "k_full": full,
        "v_full": full,
        "k_free": free,
        "v_free": free,
        "turn": plgpu.Barrier(num_arrivals=_COMPUTE),
    }
    if not plan.weights_in_registers:
        scratch["weights"] = tiled(_COMPUTE, _ROWS, _BLOCK)
    return scratch


@dataclass(frozen=True)
class _Ring:
    """Pages of K or of V on their way through shared memory."""

    pages: Any  # [K, P, S, H], global
    buffer: Any  # [stages, C, H], shared
    full: Any  # barriers [stages]: the copies into a stage have arrived
    free: Any  # barriers [stages]: both products have read a stage


@dataclass(frozen=True)
class _Refs:
    q: Any  # [T, N, H]
    kv_pages: Any  # i32[Z]
    tiles: Any  # i32[tiles, fields]
    out: Any  # [T, N, H]
    k: _Ring
    v: _Ring


class _Work(NamedTuple):
    """What a sequence has of a tile, for one query head, and the blocks of pages that it reads."""

    head: jax.Array
    token: jax.Array  # of the packed batch, first of the tile
    begin: jax.Array  # first row of the sequence
    end: jax.Array  # its last row + 1
    position: jax.Array  # of row 0; may be less than 0
    page: jax.Array  # where the sequence's pages begin in the list
    first: jax.Array  # block
    count: jax.Array  # of blocks


class _Seen(NamedTuple):
    """The running softmax of half a tile, float32."""

    weighted: jax.Array  # [64, H], the sum of weight * value
    highest: jax.Array  # [64], base-2 score
    total: jax.Array  # [64], the sum of weights


def _body(
    plan: _Plan,
    q: Any,
    k_pages: Any,
    v_pages: Any,
    kv_pages: Any,
    tiles: Any,
    out: Any,
    **scratch: Any,
) -> None:
    rings = [
        _Ring(pages, *(scratch.pop(f"{kind}_{part}") for part in ("buffer", "full", "free")))
        for kind, pages in (("k", k_pages), ("v", v_pages))
    ]
    refs = _Refs(q, kv_pages, tiles, out, *rings)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        _copy_pages(plan, refs)

    @pl.when(warpgroup < _COMPUTE)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        _compute(plan, refs, warpgroup, **scratch)


def _each_work(plan: _Plan, refs: _Refs, do: Callable[[_Work, jax.Array], None]) -> jax.Array:
    """Calls do(work, steps) for each piece of work of this program; `steps` counts the blocks of
    those before. Returns that of all of them."""
    program = lax.axis_index("program")

    def turn(n: jax.Array, steps: jax.Array) -> jax.Array:
        start = n * plan.programs
        forth, back = start + program, start + plan.programs - 1 - program
        index = jnp.where(lax.rem(n, jnp.int32(2)) == 0, forth, back)
        work = _work(plan, refs, jnp.minimum(index, plan.work - 1))
        work = work._replace(count=jnp.where(index < plan.work, work.count, 0))
        pl.when((index < plan.work) & (work.begin < work.end))(lambda: do(work, steps))
        return steps + work.count

    return lax.fori_loop(0, pl.cdiv(plan.work, plan.programs), turn, jnp.int32(0))


def _work(plan: _Plan, refs: _Refs, index: jax.Array) -> _Work:
    tile = lax.div(index, jnp.int32(plan.heads))
    head = lax.rem(index, jnp.int32(plan.heads))
    token, begin, end, position, page = (refs.tiles[tile, field] for field in range(5))
    window = plan.sliding_window
    oldest = jnp.int32(0) if window is None else jnp.maximum(position + begin - window + 1, 0)
    first = lax.div(oldest, jnp.int32(_BLOCK))
    stop = lax.div(jnp.maximum(position + end, 0) + (_BLOCK - 1), jnp.int32(_BLOCK))
    count = jnp.where(begin < end, jnp.maximum(stop - first, 0), 0)
    return _Work(head, token, begin, end, position, page, first, count)


# The warpgroup that copies.


def _copy_pages(plan: _Plan, refs: _Refs) -> None:
    rings = (refs.k, refs.v)

    def copy_work(work: _Work, steps: jax.Array) -> None:
        kv_head = lax.div(work.head, jnp.int32(plan.group))

        @pl.loop(0, work.count)
        def _(i: jax.Array) -> None:
            stage = lax.rem(steps + i, jnp.int32(plan.stages))
            for ring in rings:
                reused = steps + i >= plan.stages
                pl.when(reused)(partial(plgpu.barrier_wait, ring.free.at[stage]))
                for at in range(0, _BLOCK, plan.piece):
                    token = (work.first + i) * _BLOCK + at
                    entry = work.page + lax.div(token, jnp.int32(plan.page_size))
                    # A block may reach past a sequence's pages; what it reads there is masked.
                    page = refs.kv_pages[jnp.minimum(entry, plan.listed_pages - 1)]
                    start = pl.multiple_of(lax.rem(token, jnp.int32(plan.page_size)), plan.piece)
                    plgpu.copy_gmem_to_smem(
                        ring.pages.at[kv_head, page, pl.ds(start, plan.piece)],
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


# The warpgroups that compute.


def _compute(
    plan: _Plan,
    refs: _Refs,
    warpgroup: jax.Array,
    *,
    q_tiles: Any,  # [2, 64, H]
    out_tiles: Any,  # [2, 64, H]
    q_full: Any,  # barriers [2]
    turn: Any,  # barrier
    weights: Any = None,  # [2, 64, C]
) -> None:
    q_tile, out_tile = q_tiles.at[warpgroup], out_tiles.at[warpgroup]
    my_weights = None if weights is None else weights.at[warpgroup]

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def compute_work(work: _Work, steps: jax.Array) -> None:
        start = pl.multiple_of(work.token + warpgroup * _ROWS, _ROWS)
        place = pl.ds(start, _ROWS), work.head
        plgpu.copy_gmem_to_smem(refs.q.at[place], q_tile, q_full.at[warpgroup])
        plgpu.barrier_wait(q_full.at[warpgroup])
        half = _Half(plan, refs, work, steps, warpgroup, q_tile, my_weights, turn)
        seen = half.attend(take_turns)
        total = jnp.where(seen.total > 0, seen.total, jnp.ones_like(seen.total))
        out = seen.weighted * _spread(1.0 / total, plan.head_dim)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_tile[...] = out.astype(out_tile.dtype)
        plgpu.commit_smem()
        _store(refs, work, out_tile, start, *half.rows)

    # One warpgroup is half a step behind the other.
    pl.when(warpgroup == 1)(take_turns)
    _each_work(plan, refs, compute_work)
    pl.when(warpgroup == 0)(take_turns)
    plgpu.wait_smem_to_gmem(0)


def _store(
    refs: _Refs, work: _Work, out_tile: Any, start: jax.Array, begin: jax.Array, end: jax.Array
) -> None:
    """The rows of half a tile that are the sequence's; others are somebody else's to write."""

    @pl.when(end - begin == _ROWS)
    def _() -> None:
        plgpu.copy_smem_to_gmem(out_tile, refs.out.at[pl.ds(start, _ROWS), work.head])

    @pl.when(end - begin < _ROWS)
    def _() -> None:
        @pl.loop(begin, end)
        def _(i: jax.Array) -> None:
            row = out_tile.at[pl.ds(i, 1)]
            plgpu.copy_smem_to_gmem(row, refs.out.at[pl.ds(start + i, 1), work.head])


@dataclass(frozen=True)
class _Half:
    """Half a tile, as one warpgroup attends to it."""

    plan: _Plan
    refs: _Refs
    work: _Work
    steps: jax.Array
    warpgroup: jax.Array
    q_tile: Any  # [64, H]
    weights: Any  # [64, C]
    turn: Any  # barrier

    @property
    def rows(self) -> tuple[jax.Array, jax.Array]:
        """First and last + 1 of the half's rows that are the sequence's."""
        base = self.warpgroup * _ROWS
        return (
            jnp.clip(self.work.begin - base, 0, _ROWS),
            jnp.clip(self.work.end - base, 0, _ROWS),
        )

    def attend(self, take_turns: Callable[[], None]) -> _Seen:
        """All blocks of the tile. Those that no row masks go without a mask; those behind the
        newest row of this half are passed by, in step with the other half."""
        plan, work = self.plan, self.work
        wide, tall = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
        seen = _Seen(
            plgpu.layout_cast(jnp.zeros((_ROWS, plan.head_dim), jnp.float32), wide),
            plgpu.layout_cast(jnp.full((_ROWS,), LOWEST, jnp.float32), tall),
            plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), tall),
        )
        position = work.position + self.warpgroup * _ROWS
        oldest, end = (position + row for row in self.rows)
        stop = lax.div(jnp.maximum(end, 0) + (_BLOCK - 1), jnp.int32(_BLOCK)) - work.first
        mine = jnp.where(oldest < end, jnp.clip(stop, 0, work.count), 0)
        whole = jnp.int32(0)
        if plan.sliding_window is None:
            whole = jnp.clip(lax.div(jnp.maximum(oldest + 1, 0), jnp.int32(_BLOCK)), 0, mine)
        step = partial(self._step, take_turns)
        seen = lax.fori_loop(0, whole, partial(step, masked=False), seen)
        seen = lax.fori_loop(whole, mine, partial(step, masked=True), seen)

        @pl.loop(mine, work.count)
        def _(i: jax.Array) -> None:
            stage = lax.rem(self.steps + i, jnp.int32(plan.stages))
            for ring in (self.refs.k, self.refs.v):
                plgpu.barrier_wait(ring.full.at[stage])
                plgpu.barrier_arrive(ring.free.at[stage])
                take_turns()

        return seen

    def _step(
        self, take_turns: Callable[[], None], i: jax.Array, seen: _Seen, *, masked: bool
    ) -> _Seen:
        plan, k, v = self.plan, self.refs.k, self.refs.v
        stage, block = lax.rem(self.steps + i, jnp.int32(plan.stages)), self.work.first + i

        plgpu.barrier_wait(k.full.at[stage])

        def multiply(into: Any) -> jax.Array:
            plgpu.wgmma(into, self.q_tile, k.buffer.at[stage].transpose((1, 0)))
            take_turns()
            return into[...]

        into = plgpu.ACC((_ROWS, _BLOCK), jnp.float32)  # type: ignore[attr-defined]
        scores = _base_two(plan, pl.run_scoped(multiply, into))
        plgpu.barrier_arrive(k.free.at[stage])
        if masked:
            scores = jnp.where(self._visible(block), scores, MASKED)
        highest = jnp.maximum(seen.highest, scores.max(axis=1))
        fade = jnp.exp2(seen.highest - highest)
        weight = jnp.exp2(scores - _spread(highest, _BLOCK))
        weighted = seen.weighted * _spread(fade, plan.head_dim)
        total = seen.total * fade + weight.sum(axis=1)
        rounded = weight.astype(self.q_tile.dtype)
        if plan.weights_in_registers:
            weighted, total, highest, rounded = lax.optimization_barrier(
                (weighted, total, highest, rounded)
            )
        else:
            self.weights[...] = rounded
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.turn)
        plgpu.barrier_wait(v.full.at[stage])
        plgpu.barrier_wait(self.turn)
        if masked:
            self._silence(stage, block)
        values = v.buffer.at[stage]
        if plan.weights_in_registers:
            weighted = _accumulate(weighted, rounded, values)
        else:
            weighted = weighted + _product(self.weights, values, plan.head_dim)
        plgpu.barrier_arrive(v.free.at[stage])
        return _Seen(weighted, highest, total)

    def _visible(self, block: jax.Array) -> jax.Array:
        """bool[64, C]: which tokens of a block each row sees."""
        shape = (_ROWS, _BLOCK)
        first = self.work.position + self.warpgroup * _ROWS
        behind = _iota(shape, 0) + first - (_iota(shape, 1) + block * _BLOCK)
        visible = behind >= 0
        if self.plan.sliding_window is not None:
            visible &= behind < self.plan.sliding_window
        return visible

    def _silence(self, stage: jax.Array, block: jax.Array) -> None:
        """A weight of 0 does not silence a NaN, and memory that no row sees may hold one. Both
        halves clear the same rows and leave the others as they are."""
        work, values = self.work, self.refs.v.buffer
        stop = work.position + work.end
        window = self.plan.sliding_window
        start = jnp.int32(0) if window is None else work.position + work.begin - window + 1

        @pl.when(((block + 1) * _BLOCK > stop) | (block * _BLOCK < start))
        def _() -> None:
            rows = values[stage]
            token = _iota((_BLOCK, self.plan.head_dim), 0) + block * _BLOCK
            seen = (start <= token) & (token < stop)
            values[stage] = jnp.where(seen, rows, jnp.zeros_like(rows))
            plgpu.commit_smem()


def _iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _spread(x: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(x, (_ROWS, columns), (0,))


def _accumulate(sums: jax.Array, a: jax.Array, b: Any) -> jax.Array:
    """float32[64, H]: sums + a @ b, a in registers."""

    def multiply(into: Any) -> None:
        plgpu.wgmma(into, a, b)

    return pl.run_state(multiply)(plgpu.ACC.init(sums))  # type: ignore[attr-defined]


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
