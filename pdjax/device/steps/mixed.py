"""mixed_step: chunks of prompts and decode rows of one mesh, in one program, so that each weight is
read once for both.

A decode step is bound by the bytes of the weights, a prefill step by arithmetic: together the rows
cost little more than the chunks alone (chunked prefill with hybrid batches, Sarathi-Serve, Agrawal
et al. 2024). All that is said of a token by itself (products, norms, MLP) is computed over chunks
and rows at once. Attention has a kernel for each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.quantised import Pages
from pdjax.core.kv_layout import KVLayout
from pdjax.core.model_spec import ModelSpec
from pdjax.device.kept.program import KeptProgram
from pdjax.device.kv.pool import KVPool, page_specs
from pdjax.device.mesh import PREFILL_RULES, TP, shardings
from pdjax.device.models.attention import AttendPages, attend_at
from pdjax.device.models.decoder import Params, embed, forward, unembed
from pdjax.device.models.family import ModelFamily
from pdjax.device.models.registry import family_of, slot_kinds
from pdjax.device.packing import ALIGNMENT, Packed
from pdjax.device.sharing import Specs, shared
from pdjax.device.steps import decode, prefill
from pdjax.device.steps.sample import Undecided
from pdjax.interfaces.batches import IDLE_ROW


def make_mixed_step(
    params: Params, spec: ModelSpec, layout: KVLayout, *, attention: str | None
) -> KeptProgram:
    """(params, pool DONATED, undecided [n] DONATED, fed_back i32[b], packed chunks, packed tick) ->
    (pool, undecided [n] of the rows, undecided [B] of the chunks, [T, D] residual stream of the
    chunks behind the layers). Equal arguments give the same program.

    The rest is as in `make_decode_tick` and `make_prefill_step`. No sequence has both a chunk and a
    row.

    Args:
      params: as they lie on the mesh; their shardings are the step's.
      spec, layout: the model's shapes, and how it is cut; one stage.
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
    assert layout.stages == 1, f"a mixed step has one stage, not {layout.stages}"
    kinds = slot_kinds(spec, layout.stage_layers)
    reduce = partial(lax.psum, axis_name=TP) if layout.tp > 1 else None
    vocab_axes = (TP,) if layout.tp > 1 else ()

    def step(
        params: Params,
        pool: KVPool,
        undecided: Undecided,
        fed_back: jax.Array,
        chunks: Packed,
        tick: Packed,
    ) -> tuple[KVPool, Undecided, Undecided, jax.Array]:
        del undecided  # only its memory is used again
        batch, rows = prefill.unpack(chunks), decode.TickInput(**tick.unpack())
        count, positions = len(batch.tokens), rows.positions[0]
        taken = positions != IDLE_ROW
        attend_pages = _attend_both(
            count,
            prefill.attend_chunks(batch),
            decode.attend_rows(positions, rows.page_table[0], attention),
            taken=taken,
        )
        tokens = jnp.concatenate([batch.tokens, decode.entering(rows, fed_back)])
        x, layers = forward(
            params,
            embed(params, tokens, spec=spec, vocab_axes=vocab_axes),  # [T + n, D]
            pool,
            attend_at(spec, kinds, jnp.concatenate([batch.positions, positions]), attend_pages),
            kinds,
            spec=spec,
            reduce=reduce,
            live=jnp.concatenate([prefill.live_tokens(batch), taken]),
        )
        last = jnp.concatenate([x[batch.sample_at], x[count:]])
        logits = unembed(params, last, spec=spec, vocab_axes=vocab_axes)  # [B + n, V]
        sequences = len(batch.sample_at)
        of_rows = Undecided(logits[sequences:], positions + 1, rows.rows[0])
        of_chunks = prefill.undecided(logits[:sequences], batch)
        return layers, of_rows, of_chunks, x[:count]

    pages = page_specs(layout.slot_planes, PREFILL_RULES)
    jitted = _jitted(step, weights.tree, pages, mesh)
    return KeptProgram("mixed", jitted, mesh, weights, family, spec, layout, attention)


def _jitted(step: Callable, weights: Any, pages: Any, mesh: Mesh) -> Any:
    ins, outs = (weights, pages, P(), P(), P(), P()), (pages, P(), P(), P())
    mapped = jax.shard_map(step, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    return jax.jit(
        mapped,
        donate_argnums=(1, 2),
        keep_unused=True,
        in_shardings=shardings(mesh, ins),
        out_shardings=shardings(mesh, outs),
    )


def _attend_both(
    count: int, chunks: AttendPages, rows: AttendPages, *, taken: jax.Array
) -> AttendPages:
    """Attention of the first `count` tokens by `chunks`, and of the others by `rows`, of which
    those that are not `taken` bool[n] are idle.

    The rows come first. What the chunks' attention reads is then written by the operation before
    it, and each successor of the pool has one reader: were there two, and one of them wrote, XLA
    would copy the pool.
    """

    def attend(
        qkv: jax.Array,
        scale: jax.Array,
        bias: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        k_pages: Pages,
        v_pages: Pages,
        /,  # an option is named scale, too
        **options: Any,
    ) -> tuple[jax.Array, Pages, Pages]:
        def part(of: Callable[[jax.Array], jax.Array], attend: AttendPages, *pages: Pages) -> Any:
            given = of(qkv), of(scale), bias, of(cos), of(sin)
            return attend(*given, *pages, **options)

        after = part(lambda x: _behind(x, count, taken), rows, k_pages, v_pages)
        # An implementation that writes first and reads then must have read.
        of_rows, k_pages, v_pages = lax.optimization_barrier(after)
        of_chunks, k_pages, v_pages = part(lambda x: x[:count], chunks, k_pages, v_pages)
        return jnp.concatenate([of_chunks, of_rows]), k_pages, v_pages

    return attend


def _behind(x: jax.Array, count: int, taken: jax.Array) -> jax.Array:
    """x [T + n, ...] behind the first `count`: that of the rows.

    A kernel may get a part of an array without a copy, and refuses to run where that does not begin
    as `packing.ALIGNMENT` says. Such a part is selected here, as an array of its own; of idle rows
    it has zeros.
    """
    part = x[count:]
    row = x.size // len(x) * x.dtype.itemsize  # bytes
    if count * row % (4 * ALIGNMENT) == 0:
        return part
    return jnp.where(taken.reshape(-1, *[1] * (x.ndim - 1)), part, 0)
