"""prefill_step: packed chunks of several prompts, on a tensor-parallel mesh, KV written straight
into the paged pool. `sample_step` then chooses each finished prompt's first token."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels.kv_write.api import rope_and_write
from pallas_kernels.prefill_attention.api import prefill_attention
from pdjax.device.kv.pool import PAGE_AXES, KVPool
from pdjax.device.mesh import PREFILL_RULES, TP, partition, shardings
from pdjax.device.model.attention import AttendPages, attend_at
from pdjax.device.model.transformer import Params, embed, forward, unembed
from pdjax.device.packing import Packed
from pdjax.device.steps.sample import Undecided
from pdjax.engine_api import PrefillBatch
from pdjax.model_spec import ModelSpec

PrefillStep = Callable[[Params, KVPool, Packed], tuple[KVPool, Undecided]]

_CHOOSING = ("sampling", "history")
"""Fields of a PrefillBatch that only choosing reads."""


def pack(batch: PrefillBatch) -> Packed:
    """What the step reads of a batch."""
    return Packed.of({name: x for name, x in vars(batch).items() if name not in _CHOOSING})


def _unpack(packed: Packed) -> PrefillBatch:
    fields: dict[str, Any] = dict.fromkeys(_CHOOSING)
    return PrefillBatch(**fields | packed.unpack())


def make_prefill_step(params: Params, spec: ModelSpec, tp: int) -> PrefillStep:
    """(params, pool DONATED, packed batch) -> (pool, the tokens that follow those at `sample_at`).

    Args:
      params: as they lie on the prefill mesh; their shardings are the step's.
      spec: the model's shapes.
      tp: shards of the mesh.
    """
    mesh = params.unembed.sharding.mesh
    vocab_axes = (TP,) if tp > 1 else ()

    def step(params: Params, pool: KVPool, packed: Packed) -> tuple[KVPool, Undecided]:
        batch = _unpack(packed)
        x, layers = forward(
            params,
            embed(params, batch.tokens, vocab_axes),  # [T, D]
            pool.layers,
            attend_at(spec, batch.positions, _attend_pages(batch, spec)),
            spec=spec,
            reduce=partial(lax.psum, axis_name=TP) if tp > 1 else _identity,
        )
        logits = unembed(params, x[batch.sample_at], spec=spec, vocab_axes=vocab_axes)  # [B, V]
        pool = KVPool.of_layers(layers)
        return pool, Undecided(logits, positions=batch.kv_lens, row=jnp.int32(0))

    weights = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
    pages = partition(PREFILL_RULES, PAGE_AXES, stacked=True)
    ins, outs = (weights, pages, P()), (pages, P())
    mapped = jax.shard_map(step, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    return jax.jit(
        mapped,
        donate_argnums=1,
        in_shardings=shardings(mesh, ins),
        out_shardings=shardings(mesh, outs),
    )


def _attend_pages(batch: PrefillBatch, spec: ModelSpec) -> AttendPages:
    """Write the chunks' KV, then attend to it and to what earlier chunks wrote."""
    write = partial(rope_and_write, slot_mapping=batch.slot_mapping)

    def attend(*layer: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k_pages, v_pages = write(*layer)
        o = prefill_attention(
            q,
            k_pages,
            v_pages,
            batch.kv_pages,
            batch.cu_pages,
            batch.cu_q_lens,
            batch.kv_lens,
            scale=spec.head_dim**-0.5,
        )
        return o, k_pages, v_pages

    return attend


def _identity(y: jax.Array) -> jax.Array:
    return y
