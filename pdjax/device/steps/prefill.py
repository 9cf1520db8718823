"""prefill_step: packed chunks of several prompts, on a tensor-parallel mesh, KV written straight
into the paged pool.

Then `sample_step` chooses each finished prompt's first token; it is a step of its own so that the
few programs that differ in what sampling needs do not multiply with the many sizes of a prefill.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels.prefill_attention.api import prefill_attention
from pdjax.device.kv.pool import PAGE_AXES, KVPool
from pdjax.device.mesh import PREFILL_RULES, TP, partition, shardings
from pdjax.device.model.attention import PagedAttend
from pdjax.device.model.sampling import Choice, choose
from pdjax.device.model.transformer import Params, embed, forward, unembed
from pdjax.engine_api import PrefillBatch, SamplingBatch
from pdjax.model_spec import ModelSpec

jax.tree_util.register_dataclass(
    PrefillBatch, data_fields=[f.name for f in fields(PrefillBatch)], meta_fields=[]
)

PrefillStep = Callable[[Params, KVPool, PrefillBatch], tuple[KVPool, jax.Array]]
SampleStep = Callable[[jax.Array, jax.Array, SamplingBatch, jax.Array | None], Choice]


def make_prefill_step(params: Params, spec: ModelSpec, tp: int) -> PrefillStep:
    """(params, pool DONATED, batch without history) -> (pool, float32 logits [B, V] of the tokens
    at `sample_at`).

    Args:
      params: as they lie on the prefill mesh; their shardings are the step's.
      spec: the model's shapes.
      tp: shards of the mesh.
    """
    mesh = params.unembed.sharding.mesh
    vocab_axes = (TP,) if tp > 1 else ()

    def step(params: Params, pool: KVPool, batch: PrefillBatch) -> tuple[KVPool, jax.Array]:
        def read(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array) -> jax.Array:
            return prefill_attention(
                q,
                k_pages,
                v_pages,
                batch.kv_pages,
                batch.cu_pages,
                batch.cu_q_lens,
                batch.kv_lens,
                scale=spec.head_dim**-0.5,
            )

        attend = PagedAttend(pool, spec, batch.positions, batch.slot_mapping, read)
        x = embed(params, batch.tokens, vocab_axes)  # [T, D]
        x = forward(
            params,
            x,
            attend,
            spec=spec,
            reduce=partial(lax.psum, axis_name=TP) if tp > 1 else _identity,
        )
        logits = unembed(params, x[batch.sample_at], spec=spec, vocab_axes=vocab_axes)  # [B, V]
        return attend.pool, logits

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


def make_sample_step(params: Params, max_logprobs: int) -> SampleStep:
    """(logits f32[B, V], positions i32[B], sampling [B], history i32[B, C] or None) -> Choice [B],
    on every device."""
    mesh = params.unembed.sharding.mesh
    mapped = jax.shard_map(
        partial(choose, max_logprobs=max_logprobs),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(mapped, in_shardings=shardings(mesh, P()), out_shardings=shardings(mesh, P()))


def _identity(y: jax.Array) -> jax.Array:
    return y
