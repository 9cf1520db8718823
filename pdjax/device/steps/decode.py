"""decode_tick: one tick of the decode pipeline, one program over ("stage", "tp"), one dispatch.

As many microbatches are in flight as there are stages. At tick t stage s works on microbatch (t -
s) mod R: the one that enters brings its input tokens (sampled R ticks ago and kept on the device),
the one that leaves has its next tokens sampled. Activations and tokens stay on the device between
ticks, so there is no bubble to fill or drain. The vocabulary is sharded over all devices, so that
neither the first nor the last stage carries it alone.

With one stage and one shard this is a plain decode step without a collective.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.paged_attention.api import paged_attention
from pdjax.device.kv.pool import PAGE_AXES, KVPool
from pdjax.device.mesh import DECODE_RULES, STAGE, TP, partition, shardings
from pdjax.device.model.attention import PagedAttend
from pdjax.device.model.sampling import Choice, choose
from pdjax.device.model.transformer import Leaf, Params, embed, forward, unembed
from pdjax.engine_api import IDLE_ROW, USE_FED_BACK
from pdjax.kv_layout import KVLayout
from pdjax.model_spec import ModelSpec


@struct.dataclass
class TickState:
    """What lives on the device from tick to tick; donated."""

    x: Leaf  # [R * b, D], a stage's b rows on the stage: residual stream about to enter it
    fed_back: Leaf  # i32[b]: what left at the last tick and enters again at the next
    history: Leaf  # i32[R * b, C]: tokens of every row, for penalties


@struct.dataclass
class TickInput:
    """What the host says of one tick: `engine_api.DecodeBatch`, and which rows leave."""

    tokens: Leaf  # i32[b]
    positions: Leaf  # i32[R, b]
    page_table: Leaf  # i32[R, b, W]
    leaving_positions: Leaf  # i32[b]: positions under the last stage
    leaving_row: Leaf  # i32[]: first row of the microbatch that leaves
    sampling: Leaf  # SamplingBatch of [b]


STATE_SPECS = TickState(x=P(STAGE), fed_back=P(), history=P())
INPUT_SPECS = TickInput(
    tokens=P(),
    positions=P(STAGE),
    page_table=P(STAGE),
    leaving_positions=P(),
    leaving_row=P(),
    sampling=P(),
)

DecodeTick = Callable[[Params, KVPool, TickState, TickInput], tuple[KVPool, TickState, Choice]]


def make_decode_tick(
    params: Params, spec: ModelSpec, layout: KVLayout, *, max_logprobs: int, attention: str | None
) -> DecodeTick:
    """(params, pool DONATED, state DONATED, input) -> (pool, state, Choice [b] of the microbatch
    that leaves).

    Args:
      params: as they lie on the decode mesh, layers stacked over stages; their shardings are the
        tick's.
      spec, layout: the model's shapes, and how it is cut.
      max_logprobs: how many of the likeliest tokens are reported.
      attention: paged attention implementation by name, or None for the platform's.
    """
    mesh = params.unembed.sharding.mesh
    stages, tp = layout.stages, layout.tp
    vocab_axes = tuple(axis for axis, size in ((STAGE, stages), (TP, tp)) if size > 1)

    def tick(
        params: Params, pool: KVPool, state: TickState, inp: TickInput
    ) -> tuple[KVPool, TickState, Choice]:
        positions, page_table = inp.positions[0], inp.page_table[0]  # this stage's: [b], [b, W]
        attend = _attend(pool, spec, positions, page_table, attention)

        entering = jnp.where(inp.tokens == USE_FED_BACK, state.fed_back, inp.tokens)
        x = embed(params, entering, vocab_axes)  # [b, D]
        x = jnp.where(lax.axis_index(STAGE) == 0, x, state.x) if stages > 1 else x
        x = forward(
            params,
            x,
            attend,
            spec=spec,
            reduce=partial(lax.psum, axis_name=TP) if tp > 1 else _identity,
        )

        leaving = _from_last_stage(x, stages)
        logits = unembed(params, leaving, spec=spec, vocab_axes=vocab_axes)  # [b, V]
        history = lax.dynamic_slice_in_dim(state.history, inp.leaving_row, x.shape[0])
        choice = choose(
            logits, inp.leaving_positions + 1, inp.sampling, history, max_logprobs=max_logprobs
        )

        state = TickState(
            x=_to_next_stage(x, stages),
            fed_back=choice.tokens,
            history=_remember(state.history, inp, choice.tokens),
        )
        return attend.pool, state, choice

    return _compile(tick, params, mesh)


def _compile(tick: Callable, params: Params, mesh: Mesh) -> DecodeTick:
    pages = partition(DECODE_RULES, PAGE_AXES, stacked=True)
    weights = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    ins = (weights, pages, STATE_SPECS, INPUT_SPECS)
    outs = (pages, STATE_SPECS, P())
    mapped = jax.shard_map(tick, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    return jax.jit(
        mapped,
        donate_argnums=(1, 2),
        in_shardings=shardings(mesh, ins),
        out_shardings=shardings(mesh, outs),
    )


def _attend(
    pool: KVPool,
    spec: ModelSpec,
    positions: jax.Array,
    page_table: jax.Array,
    attention: str | None,
) -> PagedAttend:
    """Attention of one token a row over its pages. Idle rows write to the null page and read
    nothing."""
    page_size = pool.k[0].shape[2]
    idle = positions == IDLE_ROW
    at = jnp.where(idle, 0, positions)
    page = jnp.take_along_axis(page_table, at[:, None] // page_size, axis=1)[:, 0]
    slot_mapping = jnp.where(idle, 0, page * page_size + at % page_size)
    kv_lens = jnp.where(idle, 0, at + 1)

    def read(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> jax.Array:
        return paged_attention(
            q,
            k_pages,
            v_pages,
            page_table,
            kv_lens,
            scale=spec.head_dim**-0.5,
            implementation=attention,
        )

    return PagedAttend(pool, spec, at, slot_mapping, read)


def _from_last_stage(x: jax.Array, stages: int) -> jax.Array:
    """x of the last stage, on every stage."""
    if stages == 1:
        return x
    return lax.psum(jnp.where(lax.axis_index(STAGE) == stages - 1, x, 0), STAGE)


def _to_next_stage(x: jax.Array, stages: int) -> jax.Array:
    """x of the stage before; the first stage takes embeddings instead and gets zeros."""
    if stages == 1:
        return x
    return lax.ppermute(x, STAGE, [(stage, stage + 1) for stage in range(stages - 1)])


def _remember(history: jax.Array, inp: TickInput, tokens: jax.Array) -> jax.Array:
    """history i32[rows, C] with the leaving rows' new tokens appended; an idle row's falls outside
    and is dropped."""
    at = jnp.where(inp.leaving_positions == IDLE_ROW, history.shape[1], inp.leaving_positions + 1)
    rows = inp.leaving_row + jnp.arange(tokens.shape[0])
    return history.at[rows, at].set(tokens, mode="drop")


def _identity(y: jax.Array) -> jax.Array:
    return y
