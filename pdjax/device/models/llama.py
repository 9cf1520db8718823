"""The network: what a Llama-architecture decoder computes. It does not know that prefill and decode
exist.

One `forward(params, x, caches, attend)` serves both phases: `attend` is an argument that writes K
and V to wherever they are kept and returns what attention read. Weights are a plain pytree with a
Python list of layers, never stacked: a scan over stacked weights copies every slice it reads.

RMSNorm is `x * r * weight` with one scalar r a token. Inside the layers it has no pass of its own:
the weight is multiplied into the rows of the matrix that follows when weights are loaded, and r,
which commutes with the product, is applied after it. In real arithmetic that is exact. In bfloat16
it rounds the folded weights once, where the usual order rounds the normalized activations twice.

The functions here see *local* shards inside `jax.shard_map`. The sizes they need come from the
shards' own shapes, and `reduce` sums the partial products of tensor parallelism.

Dimension key: T tokens, D model dim, N query heads, K KV heads, G = N/K, H head dim, F MLP dim, V
vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pallas_kernels.add_rms.api import add_rms
from pallas_kernels.add_rms.reference import rms_scale
from pallas_kernels.product.api import add_product, adds_in_place, product
from pallas_kernels.swiglu.api import swiglu
from pdjax.core.model_spec import ModelSpec

Leaf = Any
"""An array, or what stands for one in a tree of the same shape: its logical axes, its sharding."""


@struct.dataclass
class Layer:
    """Weights of one layer.

    `wqkv`'s columns are grouped by KV head: G query heads, then K, then V, so that a contiguous run
    of columns is a tensor-parallel shard and Q, K and V come from one product. The rows of `wqkv`
    and `w_gate_up` have the weights of the norms before them multiplied in.
    """

    wqkv: Leaf  # [D, K * (G + 2) * H]
    bqkv: Leaf | None  # [K * (G + 2) * H]
    wo: Leaf  # [N * H, D]
    w_gate_up: Leaf  # [D, 2, F]: gate, up
    w_down: Leaf  # [F, D]


@struct.dataclass
class Params:
    """Weights of the model, or of one stage of it."""

    layers: list[Layer]
    final_norm: Leaf  # [D]
    unembed: Leaf  # [D, V]
    embed: Leaf | None  # [V, D]; None: tied, the columns of `unembed` serve


LAYER_AXES = Layer(
    wqkv=(None, "kv_heads"),
    bqkv=("kv_heads",),
    wo=("kv_heads", None),
    w_gate_up=(None, None, "mlp"),
    w_down=("mlp", None),
)
"""Logical axes of a layer's weights; `device/mesh.py` says on which mesh axis each lies in which
phase."""

MODEL_AXES = Params(layers=[], final_norm=(None,), unembed=(None, "vocab"), embed=("vocab", None))
"""Logical axes of the weights outside the layers."""


class Attend(Protocol):
    """Attention over whatever holds the KV of a layer: writes K and V, returns what the queries
    read, and the holder's successor."""

    def __call__(
        self, qkv: jax.Array, scale: jax.Array, bias: jax.Array | None, cache: Any
    ) -> tuple[jax.Array, Any]:
        """qkv [T, K, G + 2, H] of the heads of this shard, still to be scaled by f32[T], shifted by
        [K, G + 2, H] and rotated -> [T, N, H]."""
        ...


def forward(
    params: Params,
    x: jax.Array,
    caches: Sequence[Any],
    attend: Attend,
    *,
    spec: ModelSpec,
    reduce: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, list[Any]]:
    """All layers of `params` over packed tokens.

    Args:
      params: local shards; a layer of zeros is the identity, which is how a short stage pads.
      x: [T, D] residual stream.
      caches: what holds the KV of each layer.
      attend: attention over it.
      reduce: sums partial products over the tensor-parallel shards, if there are several.

    Returns:
      [T, D] residual stream before the final norm, and the successors of `caches`.
    """
    scale = rms_scale(x, spec.norm_eps)
    x, _, after = through(params.layers, x, scale, caches, attend, spec=spec, reduce=reduce)
    return x, after


def through(
    layers: Sequence[Layer],
    x: jax.Array,
    scale: jax.Array,
    caches: Sequence[Any],
    attend: Attend,
    *,
    spec: ModelSpec,
    reduce: Callable[[jax.Array], jax.Array] | None,
) -> tuple[jax.Array, jax.Array, list[Any]]:
    """Some layers in a row; see `forward`. `scale` f32[T] is that of RMSNorm for x, and comes back
    for the x that does."""
    heads = (-1, spec.group + 2, spec.head_dim)  # [K, G + 2, H], K of this shard

    @jax.jit  # layers are alike: they share one trace and one lowering, which XLA then inlines
    def one(
        x: jax.Array, scale: jax.Array, layer: Layer, cache: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        qkv = product(x, layer.wqkv).reshape(x.shape[0], *heads)
        bias = None if layer.bqkv is None else layer.bqkv.reshape(heads)
        o, cache = attend(qkv, scale, bias, cache)  # [T, N, H]
        o = o.reshape(x.shape[0], -1)
        alone = reduce is None and adds_in_place(o, layer.wo)
        x, scale = add(x, o, layer.wo)
        eps = spec.norm_eps if alone else None
        hidden = swiglu(x, scale, layer.w_gate_up, eps=eps)  # [T, F]
        x, scale = add(x, hidden, layer.w_down)
        return x, scale, cache

    def add(x: jax.Array, y: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x + y @ w of all shards, and its scale."""
        if reduce is None:
            return add_product(x, y, w, eps=spec.norm_eps)
        return add_rms(x, reduce(product(y, w)), eps=spec.norm_eps)

    after = []
    for layer, cache in zip(layers, caches, strict=True):
        x, scale, cache = one(x, scale, layer, cache)
        after.append(cache)
    return x, scale, after


def embed(params: Params, tokens: jax.Array, vocab_axes: Sequence[str] = ()) -> jax.Array:
    """tokens i32[T] -> [T, D]. The vocabulary may be sharded over `vocab_axes`: exactly one shard
    has the row."""
    shard = params.unembed.shape[1]
    local = tokens - _shard_index(vocab_axes) * shard
    mine = (local >= 0) & (local < shard)
    local = jnp.where(mine, local, 0)
    rows = params.unembed[:, local].T if params.embed is None else params.embed[local]  # [T, D]
    rows = jnp.where(mine[:, None], rows, 0)
    return lax.psum(rows, tuple(vocab_axes)) if vocab_axes else rows


def unembed(
    params: Params, x: jax.Array, *, spec: ModelSpec, vocab_axes: Sequence[str] = ()
) -> jax.Array:
    """x [B, D] -> float32 logits [B, V], whole on every shard of `vocab_axes`.

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
    if vocab_axes:
        logits = lax.all_gather(logits, tuple(vocab_axes), axis=1, tiled=True)
    return logits[:, : spec.vocab_size]  # the shards pad V to a common size


def _shard_index(axes: Sequence[str]) -> jax.Array | int:
    return lax.axis_index(tuple(axes)) if axes else 0
