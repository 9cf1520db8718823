"""Prefill attention as a Mosaic kernel for TPUs.

The packed batch is cut at every boundary of a tile of tokens and at every boundary of a sequence.
Programs run one after another; each takes the tokens between two cuts. It walks the pages that its
tokens see in blocks: while it multiplies one block, the next block (at the end, the next program's
first) is copied from HBM into the other half of a double buffer. One copy moves all KV heads of a
page. Tests interpret and lower the kernel, and the compiler of libtpu 0.0.48 takes it for v5e and
v6e; it has not run on a TPU yet.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.finite import guarded
from pallas_kernels.online_softmax import LOWEST, MASKED
from pallas_kernels.tpu_tiles import LANES, page_bytes, pages_refusal

# Of VMEM's 16 MiB or more, shares of K and V; a tile's q, output and sums; a head's scores.
_BUFFER_BYTES = 4 << 20
_STATE_BYTES = 6 << 20
_SCORE_BYTES = 1 << 20
_FEWEST_TOKENS = 16  # a tile of bfloat16
_MAX_TOKENS = 128
_MAX_BLOCK_TOKENS = 512
_SCALAR_BYTES = 512 << 10  # scalar memory for metadata: half of it


@dataclass(frozen=True)
class _Plan:
    """The static parameters of a launch."""

    tile: int  # tokens, a power of 2
    tiles: int
    sequences: int
    page_size: int
    block_pages: int
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None

    @property
    def block(self) -> int:
        """Tokens of a block of pages."""
        return self.block_pages * self.page_size


class _Scalars(NamedTuple):
    """References to scalar memory, i32; see _cuts for the first two."""

    starts: Any  # [programs + 2]
    sequence: Any  # [programs + 2]
    kv_pages: Any  # [Z]
    cu_pages: Any  # [B + 1]
    shift: Any  # [B]; token t of sequence b has position t + shift[b]


class _State(NamedTuple):
    """References to a program's state of each KV head; the last three are float32 and those of
    online_softmax.Running."""

    q: Any  # [K, G * tile, H], head after head of the group
    weighted: Any  # [K, G * tile, H]
    highest: Any  # [K, G * tile, 1]
    total: Any  # [K, G * tile, 1]


class _Run(NamedTuple):
    """The tokens of one program, of one tile and one sequence; all fields are scalars."""

    low: jax.Array  # its tokens of the packed batch, from low to high - 1
    high: jax.Array
    shift: jax.Array  # position of a token minus its index
    page: jax.Array  # where the sequence's pages begin in kv_pages
    oldest: jax.Array  # the positions that any of its tokens sees, from oldest to end - 1
    end: jax.Array
    first: jax.Array  # first block that any of its tokens sees
    blocks: jax.Array  # number of blocks of pages; 0 for padding


def refusal(q: jax.Array, k_pages: jax.Array, kv_pages: jax.Array) -> str | None:
    """Say why the kernel does not take these arguments, or return None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16) or k_pages.dtype != q.dtype:
        return f"q and pages must both be float32 or bfloat16, not {q.dtype} and {k_pages.dtype}"
    if reason := pages_refusal(k_pages):
        return reason
    if 4 * page_bytes(k_pages) > _BUFFER_BYTES:
        return f"four pages of {page_bytes(k_pages)} bytes exceed {_BUFFER_BYTES} bytes"
    if _fitting_tokens(q, k_pages) < _FEWEST_TOKENS:
        return f"{_FEWEST_TOKENS} tokens of {q.shape[1]} heads exceed the memory of a program"
    scalars = 4 * (2 * pl.cdiv(len(q), _FEWEST_TOKENS) + len(kv_pages))
    if scalars > _SCALAR_BYTES:
        return f"{scalars} bytes of cuts and page ids exceed {_SCALAR_BYTES} bytes"
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
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """See `pallas_kernels.prefill_attention.api.prefill_attention`; arguments are already checked.

    Args:
      interpret: run in Pallas' interpreter, on the CPU.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, _, page_size, _ = k_pages.shape
    tile = _tile_tokens(q, k_pages)
    plan = _Plan(
        tile=tile,
        tiles=pl.cdiv(tokens, tile),
        sequences=len(kv_lens),
        page_size=page_size,
        block_pages=_block_pages(k_pages, heads // kv_heads * tile, len(kv_pages)),
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        sliding_window=sliding_window,
    )
    starts, sequence = _cuts(plan, cu_q_lens)

    def tile_of(program: jax.Array, starts: Any, *_: Any) -> tuple[jax.Array, int]:
        return jnp.minimum(lax.div(starts[program], plan.tile), plan.tiles - 1), 0

    by_tile = pl.BlockSpec((tile, heads * head_dim), tile_of)
    in_place = pl.BlockSpec(memory_space=pl.ANY)
    kernel = pl.pallas_call(
        partial(_attend_run, plan),
        out_shape=jax.ShapeDtypeStruct((tokens, heads * head_dim), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(len(starts) - 2,),
            in_specs=[by_tile, in_place, in_place],
            out_specs=by_tile,
            scratch_shapes=_scratch(plan, q, k_pages),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="prefill_attention",
    )
    scalars = _Scalars(starts, sequence, kv_pages, cu_pages, kv_lens - cu_q_lens[1:])
    # q has two dimensions, as the projection made it: heads are gathered in VMEM, not in HBM.
    out = kernel(*scalars, q.reshape(tokens, -1), k_pages, v_pages)
    return out.reshape(tokens, heads, head_dim)


def _scratch(plan: _Plan, q: jax.Array, k_pages: jax.Array) -> list[Any]:
    """Allocate the last arguments of _attend_run."""
    _, heads, head_dim = q.shape
    kv_heads = len(k_pages)
    rows = heads // kv_heads * plan.tile
    buffer = pltpu.VMEM((2, kv_heads, plan.block, head_dim), k_pages.dtype)
    return [
        pltpu.VMEM((kv_heads, rows, head_dim), q.dtype),
        pltpu.VMEM((kv_heads, rows, head_dim), jnp.float32),
        pltpu.VMEM((kv_heads, rows, 1), jnp.float32),
        pltpu.VMEM((kv_heads, rows, 1), jnp.float32),
        buffer,
        buffer,
        pltpu.SemaphoreType.DMA((2, 2)),
        pltpu.SMEM((1,), jnp.int32),
    ]


def _fitting_tokens(q: jax.Array, k_pages: jax.Array) -> int:
    """Return the largest tile for which all heads, and one head's scores of a page, fit."""
    _, heads, head_dim = q.shape
    kv_heads, _, page_size, _ = k_pages.shape
    # q and the output are there twice each, and q by heads; then weighted values, maxima, sums.
    columns = max(head_dim, LANES)
    state = heads * (5 * columns * q.dtype.itemsize + 4 * (columns + 2 * LANES))
    scores = heads // kv_heads * max(page_size, LANES) * 4
    return min(_STATE_BYTES // state, _SCORE_BYTES // scores)


def _tile_tokens(q: jax.Array, k_pages: jax.Array) -> int:
    """Return the tokens of a tile: a power of 2, so that a row's bits give its token."""
    fitting = min(_fitting_tokens(q, k_pages), _MAX_TOKENS)
    wanted = 1 << (max(len(q), _FEWEST_TOKENS) - 1).bit_length()
    return min(1 << (fitting.bit_length() - 1), wanted)


def _block_pages(pages: jax.Array, rows: int, listed: int) -> int:
    """Number of pages of a block: two blocks of K and of V fill the buffer, within a limit."""
    tokens = min(_MAX_BLOCK_TOKENS, _SCORE_BYTES // (4 * rows))
    fitting = _BUFFER_BYTES // (4 * page_bytes(pages))
    return min(fitting, max(1, tokens // pages.shape[2]), listed)


def _cuts(plan: _Plan, cu_q_lens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return where each program's tokens begin, and their sequence.

    Returns:
      i32[programs + 2], starts in ascending order; a program takes the tokens up to the next start.
      Starts beyond the number of cuts lie behind the last tile.
      i32[programs + 2], the sequence of each; that of padding is B, behind all others.
    """
    tiles = jnp.arange(plan.tiles, dtype=jnp.int32) * plan.tile
    cuts = jnp.concatenate([tiles, cu_q_lens])
    starts = jnp.unique(cuts, size=len(cuts) + 2, fill_value=plan.tiles * plan.tile)
    sequence = (cu_q_lens[1:] <= starts[:, None]).sum(axis=1, dtype=jnp.int32)
    return starts, sequence


def _attend_run(
    plan: _Plan,
    starts: jax.Ref,  # scalar memory, like the next four; see _Scalars
    sequence: jax.Ref,
    kv_pages: jax.Ref,
    cu_pages: jax.Ref,
    shift: jax.Ref,
    q_ref: jax.Ref,  # [tile, N * H]
    k_ref: jax.Ref,  # [K, P, S, H], HBM
    v_ref: jax.Ref,  # [K, P, S, H], HBM
    out_ref: jax.Ref,  # [tile, N * H]
    q_rows: jax.Ref,  # [K, G * tile, H], like the next three; see _State
    weighted: jax.Ref,
    highest: jax.Ref,
    total: jax.Ref,
    k_buffer: jax.Ref,  # [2, K, C, H]
    v_buffer: jax.Ref,  # [2, K, C, H]
    arrived: jax.Ref,  # semaphores [2, 2], one for each half of each buffer
    turn_ref: jax.Ref,  # i32[1], scalar memory: blocks of the programs before
) -> None:
    scalars = _Scalars(starts, sequence, kv_pages, cu_pages, shift)
    state = _State(q_rows, weighted, highest, total)
    program = pl.program_id(0)
    run, following = _run_of(plan, scalars, program), _run_of(plan, scalars, program + 1)
    turn = jnp.where(program == 0, 0, turn_ref[0])

    def each_page(run: _Run, i: jax.Array, half: Any, act: Callable[[Any], None]) -> None:
        sides = (
            (k_ref, k_buffer.at[half], arrived.at[half, 0]),
            (v_ref, v_buffer.at[half], arrived.at[half, 1]),
        )
        _each_page(plan, run, i, kv_pages, sides, act)

    def fetch(run: _Run, i: jax.Array, half: Any, wanted: jax.Array) -> None:
        pl.when(wanted)(lambda: each_page(run, i, half, lambda copy: copy.start()))

    fetch(run, run.first, 0, (program == 0) & (run.blocks > 0))
    pl.when(run.low < run.high)(lambda: _begin(plan, run, q_ref, state))

    @pl.loop(0, run.blocks)
    def _(j: jax.Array) -> None:
        i, half = run.first + j, lax.rem(turn + j, 2)
        last = j + 1 == run.blocks
        fetch(run, i + 1, 1 - half, ~last)
        fetch(following, following.first, 1 - half, last & (following.blocks > 0))
        each_page(run, i, half, lambda copy: copy.wait())
        _see_block(plan, run, i, state, k_buffer.at[half], v_buffer.at[half])

    pl.when(run.low < run.high)(lambda: _end(plan, run, state, out_ref))
    turn_ref[0] = turn + run.blocks


def _run_of(plan: _Plan, scalars: _Scalars, program: jax.Array) -> _Run:
    low, high = scalars.starts[program], scalars.starts[program + 1]
    sequence = scalars.sequence[program]
    named = jnp.minimum(sequence, plan.sequences - 1)
    shift = scalars.shift[named]
    oldest = jnp.int32(0)
    if plan.sliding_window is not None:
        oldest = jnp.maximum(low + shift - plan.sliding_window + 1, 0)
    end, first = high + shift, lax.div(oldest, plan.block)
    # At least one for real tokens, so that each program's first block is always copied early.
    blocks = jnp.maximum(pl.cdiv(end, plan.block) - first, 1)
    return _Run(
        low=low,
        high=high,
        shift=shift,
        page=scalars.cu_pages[named],
        oldest=oldest,
        end=end,
        first=first,
        blocks=jnp.where(sequence < plan.sequences, blocks, 0),
    )


def _each_page(
    plan: _Plan,
    run: _Run,
    i: jax.Array,
    kv_pages: Any,
    sides: tuple[tuple[Any, Any, Any], ...],
    act: Callable[[Any], None],
) -> None:
    """Call `act` with each copy of block i; pages without a token that the run sees are not copied.

    Args:
      sides: for K and for V, the pool [K, P, S, H], the block's buffer [K, C, H], a semaphore.
    """
    lower = jnp.maximum(i * plan.block_pages, lax.div(run.oldest, plan.page_size))
    upper = jnp.minimum((i + 1) * plan.block_pages, pl.cdiv(run.end, plan.page_size))

    @pl.loop(lower, upper)
    def _(page: jax.Array) -> None:
        source = kv_pages[run.page + page]
        at = pl.multiple_of((page - i * plan.block_pages) * plan.page_size, plan.page_size)
        for pages, block, arrived in sides:
            target = block.at[:, pl.ds(at, plan.page_size)]
            act(pltpu.make_async_copy(pages.at[:, source], target, arrived))


def _begin(plan: _Plan, run: _Run, q_ref: jax.Ref, state: _State) -> None:
    """Reset the running softmax; where a tile begins, gather its queries by KV head."""
    state.weighted[...] = jnp.zeros(state.weighted.shape, jnp.float32)
    state.highest[...] = jnp.full(state.highest.shape, LOWEST, jnp.float32)
    state.total[...] = jnp.zeros(state.total.shape, jnp.float32)

    @pl.when(lax.rem(run.low, plan.tile) == 0)
    def _() -> None:
        for head, rows, columns in _heads(plan, state):
            state.q[head, rows] = q_ref[:, columns]


def _end(plan: _Plan, run: _Run, state: _State, out_ref: jax.Ref) -> None:
    """Store the run's tokens; other programs store the tile's other tokens."""
    in_run = _token(plan, run, plan.tile)[1]
    for head, rows, columns in _heads(plan, state):
        total = state.total[head, rows]
        out = state.weighted[head, rows] / jnp.where(total > 0, total, 1)
        others = out_ref[:, columns].astype(jnp.float32)
        out_ref[:, columns] = jnp.where(in_run, out, others).astype(out_ref.dtype)


def _heads(plan: _Plan, state: _State) -> Iterator[tuple[int, Any, Any]]:
    """Yield each query head's KV head, its rows there, and its columns in the packed batch."""
    kv_heads, rows, head_dim = state.q.shape
    group = rows // plan.tile
    for n, (head, i) in enumerate(product(range(kv_heads), range(group))):
        yield head, pl.ds(i * plan.tile, plan.tile), pl.ds(n * head_dim, head_dim)


def _token(plan: _Plan, run: _Run, rows: int) -> tuple[jax.Array, jax.Array]:
    """Return each row's index in the packed batch, i32[rows, 1], and whether this run has it."""
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    token = run.low - lax.rem(run.low, plan.tile) + (row & (plan.tile - 1))
    return token, (run.low <= token) & (token < run.high)


def _see_block(
    plan: _Plan, run: _Run, i: jax.Array, state: _State, k_ref: jax.Ref, v_ref: jax.Ref
) -> None:
    """Do online_softmax.see_block for all heads over block i, in k_ref and v_ref [K, C, H], with
    products in the pages' own type."""
    kv_heads, rows = state.q.shape[:2]
    start, end = i * plan.block, (i + 1) * plan.block
    token, in_run = _token(plan, run, rows)
    position = jnp.where(in_run, token + run.shift, -1)  # -1 sees nothing
    key = start + lax.broadcasted_iota(jnp.int32, (1, plan.block), 1)
    visible = key <= position  # [G * tile, C]
    if plan.sliding_window is not None:
        visible &= position - key < plan.sliding_window

    window = plan.sliding_window or run.end
    masked = (end > run.low + run.shift + 1) | (start < run.end - window)

    @pl.when(masked)
    def _() -> None:
        # A weight of 0 removes no NaN, so K takes V's NaN. Older TPUs select only 32-bit numbers.
        k, v = (ref[...].astype(jnp.float32) for ref in (k_ref, v_ref))
        k, v = guarded(k, v, jnp.inf)
        k_ref[...], v_ref[...] = k.astype(k_ref.dtype), v.astype(v_ref.dtype)

    dot = partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if state.q.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    for head in range(kv_heads):
        scores = dot(state.q[head], k_ref[head], (((1,), (1,)), ((), ()))) * plan.scale
        if plan.logit_soft_cap is not None:
            scores = plan.logit_soft_cap * jnp.tanh(scores / plan.logit_soft_cap)
        scores = jnp.where(visible, scores, MASKED)  # [G * tile, C]
        highest = state.highest[head]
        higher = jnp.maximum(highest, scores.max(axis=1, keepdims=True))
        weights, fade = jnp.exp(scores - higher), jnp.exp(highest - higher)
        values = dot(weights.astype(v_ref.dtype), v_ref[head], (((1,), (0,)), ((), ())))
        state.weighted[head] = state.weighted[head] * fade + values
        state.highest[head] = higher
        state.total[head] = state.total[head] * fade + weights.sum(axis=1, keepdims=True)
