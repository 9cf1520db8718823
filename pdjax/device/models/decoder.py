"""The network around its layers, for all families. It does not know that prefill and decode exist.

One `forward(params, x, caches, attend)` serves both phases: `attend` is an argument that writes K
and V to wherever they are kept and returns what attention read. Weights are a plain pytree with a
Python list of layers, never stacked: a scan over stacked weights copies every slice it reads.

The functions here see *local* shards inside `jax.shard_map`. The sizes they need come from the
shards' own shapes, and `reduce` sums the partial products of tensor parallelism.

Dimension key: T tokens, D model dim, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import cache as once
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pallas_kernels.add_rms.reference import rms_scale
from pdjax.core.model_spec import ModelSpec
from pdjax.device.models.family import Attend, Layer, LayerKind, Leaf, Reduce
from pdjax.device.models.registry import family_of


@struct.dataclass
class Params:
    """Weights of the model, or of one stage of it."""

    layers: list[Layer]
    final_norm: Leaf  # [D]
    unembed: Leaf  # [D, V]
    embed: Leaf | None  # [V, D]; None: tied, the columns of `unembed` serve


def forward(
    params: Params,
    x: jax.Array,
    caches: Sequence[Any],
    attend: Attend,
    kinds: Sequence[LayerKind],
    *,
    spec: ModelSpec,
    reduce: Reduce | None = None,
    live: jax.Array | None = None,
) -> tuple[jax.Array, list[Any]]:
    """Compute all layers of `params` over packed tokens.

    Args:
      params: local shards; a layer of zeros is the identity, which is how a short stage pads.
      x: [T, D] residual stream.
      caches: what holds the KV of each layer.
      attend: attention over it.
      kinds: of each layer.
      reduce: sums partial products over the tensor-parallel shards, if there are several.
      live: bool[T], which of the tokens do not pad; None: all.

    Returns:
      [T, D] residual stream before the final norm, and the successors of `caches`.
    """
    scale = rms_scale(x, spec.norm_eps)
    options: Any = {"spec": spec, "reduce": reduce, "live": live}
    x, _, after = through(params.layers, x, scale, caches, attend, kinds, **options)
    return x, after


def through(
    layers: Sequence[Layer],
    x: jax.Array,
    scale: jax.Array,
    caches: Sequence[Any],
    attend: Attend,
    kinds: Sequence[LayerKind],
    *,
    spec: ModelSpec,
    reduce: Reduce | None,
    live: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, list[Any]]:
    """Compute some layers in a row; see `forward`. `scale` f32[T] is that of RMSNorm for x, and the
    result has that for its own x."""
    family = family_of(spec)

    @once  # layers of a kind share one trace and one lowering, which XLA then inlines
    def program(kind: LayerKind) -> Callable[..., tuple[jax.Array, jax.Array, Any]]:
        @jax.jit
        def one(
            x: jax.Array, scale: jax.Array, layer: Layer, cache: Any
        ) -> tuple[jax.Array, jax.Array, Any]:
            options: Any = {"spec": spec, "kind": kind, "reduce": reduce, "live": live}
            return family.block(layer, x, scale, cache, attend, **options)

        return one

    after = []
    for layer, cache, kind in zip(layers, caches, kinds, strict=True):
        x, scale, cache = program(kind)(x, scale, layer, cache)
        after.append(cache)
    return x, scale, after


def embed(
    params: Params, tokens: jax.Array, *, spec: ModelSpec, vocab_axes: Sequence[str] = ()
) -> jax.Array:
    """Map tokens i32[T] to [T, D]. The vocabulary may be sharded over `vocab_axes`: exactly one
    shard has the row."""
    shard = params.unembed.shape[1]
    local = tokens - _shard_index(vocab_axes) * shard
    mine = (local >= 0) & (local < shard)
    local = jnp.where(mine, local, 0)
    rows = params.unembed[:, local].T if params.embed is None else params.embed[local]  # [T, D]
    rows = jnp.where(mine[:, None], rows, 0)
    scale = family_of(spec).around(spec).embed_scale
    rows = rows if scale == 1 else rows * jnp.asarray(scale, rows.dtype)
    return lax.psum(rows, tuple(vocab_axes)) if vocab_axes else rows


def unembed(
    params: Params, x: jax.Array, *, spec: ModelSpec, vocab_axes: Sequence[str] = ()
) -> jax.Array:
    """Map x [B, D] to float32 logits [B, V], whole on every shard of `vocab_axes`.

    The norm comes first here: there are few rows, and tied embeddings leave no matrix to fold its
    weight into.
    """
    scale = rms_scale(x, spec.norm_eps)
    # A row so large that its squares overflow has a scale of 0. It would get logits of 0, and with
    # them the first token of the vocabulary; NaN says that there is none.
    scale = jnp.where(scale > 0, scale, jnp.nan)
    normed = x.astype(jnp.float32) * scale[:, None]
    normed = normed.astype(x.dtype) * params.final_norm
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    logits = lax.dot(
        normed, params.unembed, precision=precision, preferred_element_type=jnp.float32
    )
    cap = family_of(spec).around(spec).logit_soft_cap
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    if vocab_axes:
        logits = lax.all_gather(logits, tuple(vocab_axes), axis=1, tiled=True)
    return logits[:, : spec.vocab_size]  # the shards pad V to a common size


def _shard_index(axes: Sequence[str]) -> jax.Array | int:
    return lax.axis_index(tuple(axes)) if axes else 0
