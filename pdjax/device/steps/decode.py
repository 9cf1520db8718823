"""decode_tick: one tick of the decode pipeline, one program over ("stage", "tp"), one dispatch.

As many microbatches are in flight as there are stages. At tick t stage s works on microbatch (t -
s) mod R: the one that enters brings its input tokens (sampled R ticks ago and kept on the device),
the one that leaves has its next tokens chosen by `sample_step`. Activations and tokens stay on the
device between ticks, so there is no bubble to fill or drain. The vocabulary is sharded over all
devices, so that neither the first nor the last stage carries it alone.

A tick is compiled for each number n of entries that it may compute of a microbatch, from one row to
all b of them. What is kept of a row from tick to tick lies where its row says, so that the n of a
tick and that of the next need not be the same.

A tick writes its results over those of the last tick of its n, so that only the host's small upload
has a new address each time. On GPUs XLA launches a tick as one CUDA graph, and updates every node
of the graph whose addresses have changed. Updating all nodes took longer than the host's other
work.

With one stage and one shard this is a plain decode step without a collective.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.paged_attention.api import append_attention
from pallas_kernels.quantised import Pages
from pdjax.core.kv_layout import KVLayout
from pdjax.core.model_spec import ModelSpec
from pdjax.device.kept.program import KeptProgram
from pdjax.device.kv.pool import KVPool, page_specs
from pdjax.device.mesh import DECODE_RULES, STAGE, TP, shardings
from pdjax.device.models.attention import AttendPages, attend_at
from pdjax.device.models.decoder import Params, embed, forward, unembed
from pdjax.device.models.family import Leaf, ModelFamily
from pdjax.device.models.registry import family_of, slot_kinds
from pdjax.device.packing import Packed
from pdjax.device.sharing import Specs, shared
from pdjax.device.steps.sample import Undecided
from pdjax.interfaces.batches import IDLE_ROW, USE_FED_BACK, DecodeBatch

X_SPEC = P(STAGE)
"""Spec of the residual stream that enters the stages, [R * b, D]: a stage holds its own b rows."""


@dataclass(frozen=True)
class TickInput:
    """The host's input of one tick: fields of `interfaces.DecodeBatch`."""

    tokens: Any  # i32[n]
    rows: Any  # i32[R, n]
    positions: Any  # i32[R, n]
    page_table: Any  # i32[R, n, W]


_INPUT = tuple(field.name for field in fields(TickInput))


@struct.dataclass
class Carried:
    """Results of a tick that stay on the devices; the next tick writes over them."""

    x: Leaf  # [R * b, D], see X_SPEC; of a stage's b, those past the last n mean nothing
    undecided: Undecided  # [n], of the microbatch that has left


def leaving_microbatch(batch: DecodeBatch) -> int:
    """The microbatch that leaves the last stage at this tick, and whose next tokens are chosen."""
    stages = len(batch.positions)
    return (batch.tick - stages + 1) % stages


def pack(batch: DecodeBatch) -> Packed:
    """The fields of a batch that the tick reads."""
    return Packed.of({name: getattr(batch, name) for name in _INPUT})


def make_decode_tick(
    params: Params, spec: ModelSpec, layout: KVLayout, *, attention: str | None
) -> KeptProgram:
    """(params, pool DONATED, carried DONATED, fed_back, packed input) -> (pool, carried). Equal
    arguments give the same program.

    `fed_back` i32[b] are, by the places of their rows, the tokens of the microbatch that left at
    the last tick and enters now.

    Args:
      params: as they lie on the decode mesh, layers stacked over stages; their shardings are the
        tick's.
      spec, layout: the model's shapes, and how it is cut.
      attention: `append_attention`'s implementation by name, or None for the platform's.
    """
    mesh = params.unembed.sharding.mesh
    return _make(mesh, Specs.of(params), family_of(spec), spec, layout, attention)


@shared
def _make(
    mesh: Mesh,
    weights: Specs,
    family: ModelFamily,  # that the spec names now
    spec: ModelSpec,
    layout: KVLayout,
    attention: str | None,
) -> KeptProgram:
    stages, tp = layout.stages, layout.tp
    kinds = slot_kinds(spec, layout.stage_layers)
    vocab_axes = tuple(axis for axis, size in ((STAGE, stages), (TP, tp)) if size > 1)

    def tick(
        params: Params, pool: KVPool, carried: Carried, fed_back: jax.Array, packed: Packed
    ) -> tuple[KVPool, Carried]:
        inp = TickInput(**packed.unpack())
        stage = lax.axis_index(STAGE) if stages > 1 else 0
        positions, page_table = inp.positions[stage], inp.page_table[stage]  # [n], [n, W]
        attend_pages = attend_rows(positions, page_table, attention)
        x = embed(params, entering(inp, fed_back), spec=spec, vocab_axes=vocab_axes)  # [n, D]
        if stages > 1:
            x = jnp.where(stage == 0, x, carried.x[: len(x)])
        x, layers = forward(
            params,
            x,
            pool,
            attend_at(spec, kinds, positions, attend_pages),
            kinds,
            spec=spec,
            reduce=partial(lax.psum, axis_name=TP) if tp > 1 else None,
            live=positions != IDLE_ROW,
        )

        leaving = _from_last_stage(x, stages)
        undecided = Undecided(
            unembed(params, leaving, spec=spec, vocab_axes=vocab_axes),  # [n, V]
            positions=inp.positions[-1] + 1,  # of the next token; 0 in an idle entry
            rows=inp.rows[-1],
        )
        return layers, Carried(_to_next_stage(carried.x, x, stages), undecided)

    jitted = _jitted(tick, weights.tree, page_specs(layout.slot_planes, DECODE_RULES), mesh)
    return KeptProgram("tick", jitted, mesh, weights, family, spec, layout, attention)


def _jitted(tick: Callable, weights: Any, pages: Any, mesh: Mesh) -> Any:
    carried = Carried(X_SPEC, Undecided(P(), P(), P()))
    ins, outs = (weights, pages, carried, P(), P()), (pages, carried)
    mapped = jax.shard_map(tick, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    return jax.jit(
        mapped,
        donate_argnums=(1, 2),
        keep_unused=True,  # also buffers of which only the memory is used again
        in_shardings=shardings(mesh, ins),
        out_shardings=shardings(mesh, outs),
    )


def entering(inp: TickInput, fed_back: jax.Array) -> jax.Array:
    """i32[n], the input tokens of the microbatch that enters."""
    fed = fed_back[inp.rows[0] % len(fed_back)]
    return jnp.where(inp.tokens == USE_FED_BACK, fed, inp.tokens)


def attend_rows(positions: jax.Array, page_table: jax.Array, attention: str | None) -> AttendPages:
    """Append one token an entry to its row's pages and attend to them. Idle entries write to the
    null page and read nothing."""
    kv_lens = jnp.where(positions == IDLE_ROW, 0, positions + 1)

    def attend(*layer: Any, **options: Any) -> tuple[jax.Array, Pages, Pages]:
        operands = (*layer, page_table, kv_lens)
        return append_attention(*operands, **options, implementation=attention)

    return attend


def _from_last_stage(x: jax.Array, stages: int) -> jax.Array:
    """x of the last stage, on every stage."""
    if stages == 1:
        return x
    return lax.psum(jnp.where(lax.axis_index(STAGE) == stages - 1, x, 0), STAGE)


def _to_next_stage(carried: jax.Array, x: jax.Array, stages: int) -> jax.Array:
    """`carried` [b, D] with x [n, D] of the stage before at its beginning; the first stage takes
    embeddings instead and gets zeros."""
    if stages == 1:
        return carried
    moved = lax.ppermute(x, STAGE, [(stage, stage + 1) for stage in range(stages - 1)])
    return lax.dynamic_update_slice(carried, moved, (0, 0))
