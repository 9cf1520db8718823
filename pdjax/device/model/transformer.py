"""The network: what a Llama-architecture decoder computes. It does not know that prefill and decode
exist.

One `forward(params, x, attend)` serves both phases: `attend` is an argument that writes K and V to
wherever they are kept and returns what attention read. Weights are a plain pytree with a Python
list of layers, never stacked: a scan over stacked weights copies every slice it reads.

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

from pdjax.model_spec import ModelSpec

Leaf = Any
"""An array, or what stands for one in a tree of the same shape: its logical axes, its sharding."""


@struct.dataclass
class Layer:
    """Weights of one layer.

    `wqkv`'s columns are grouped by KV head: G query heads, then K, then V, so that a contiguous run
    of columns is a tensor-parallel shard and Q, K and V come from one product.
    """

    attn_norm: Leaf  # [D]
    wqkv: Leaf  # [D, K * (G + 2) * H]
    bqkv: Leaf | None  # [K * (G + 2) * H]
    wo: Leaf  # [N * H, D]
    mlp_norm: Leaf  # [D]
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
    attn_norm=(None,),
    wqkv=(None, "kv_heads"),
    bqkv=("kv_heads",),
    wo=("kv_heads", None),
    mlp_norm=(None,),
    w_gate_up=(None, None, "mlp"),
    w_down=("mlp", None),
)
"""Logical axes of a layer's weights; `device/mesh.py` says on which mesh axis each lies in which
phase."""

MODEL_AXES = Params(layers=[], final_norm=(None,), unembed=(None, "vocab"), embed=("vocab", None))
"""Logical axes of the weights outside the layers."""


class Attend(Protocol):
    """Attention over whatever holds the KV: writes `k`, `v` of layer slot `slot`, returns what `q`
    reads."""

    def __call__(self, slot: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q [T, N, H], k and v [T, K, H], before RoPE -> [T, N, H]."""
        ...


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [T, A] @ w [A, B] -> [T, B]; float32 stays float32 on accelerators that would otherwise
    round it."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, w, precision=precision)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [T, D] scaled to unit root mean square, computed in float32."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight


def project_qkv(
    x: jax.Array, layer: Layer, spec: ModelSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [T, D] -> q [T, N, H], k [T, K, H], v [T, K, H], with the heads of this shard."""
    tokens = x.shape[0]
    qkv = dot(x, layer.wqkv)
    if layer.bqkv is not None:
        qkv = qkv + layer.bqkv
    qkv = qkv.reshape(tokens, -1, spec.group + 2, spec.head_dim)  # [T, K, G + 2, H]
    q = qkv[:, :, : spec.group].reshape(tokens, -1, spec.head_dim)
    return q, qkv[:, :, spec.group], qkv[:, :, spec.group + 1]


def swiglu(x: jax.Array, layer: Layer) -> jax.Array:
    """x [T, D] -> [T, D], a partial sum over the shards of F."""
    mlp_dim = layer.w_gate_up.shape[2]
    gate_up = dot(x, layer.w_gate_up.reshape(x.shape[1], 2 * mlp_dim))
    return dot(jax.nn.silu(gate_up[:, :mlp_dim]) * gate_up[:, mlp_dim:], layer.w_down)


def forward(
    params: Params,
    x: jax.Array,
    attend: Attend,
    *,
    spec: ModelSpec,
    reduce: Callable[[jax.Array], jax.Array] = lambda y: y,
) -> jax.Array:
    """All layers of `params` over packed tokens.

    Args:
      params: local shards; a layer of zeros is the identity, which is how a short stage pads.
      x: [T, D] residual stream.
      attend: attention over the KV that it keeps.
      reduce: sums partial products over the tensor-parallel shards.

    Returns:
      [T, D] residual stream before the final norm.
    """
    for slot, layer in enumerate(params.layers):
        q, k, v = project_qkv(rms_norm(x, layer.attn_norm, spec.norm_eps), layer, spec)
        o = attend(slot, q, k, v).reshape(x.shape[0], -1)
        x = x + reduce(dot(o, layer.wo))
        x = x + reduce(swiglu(rms_norm(x, layer.mlp_norm, spec.norm_eps), layer))
    return x


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
    """x [B, D] -> float32 logits [B, V], whole on every shard of `vocab_axes`."""
    logits = dot(rms_norm(x, params.final_norm, spec.norm_eps), params.unembed)
    if vocab_axes:
        logits = lax.all_gather(logits, tuple(vocab_axes), axis=1, tiled=True)
    return logits[:, : spec.vocab_size].astype(jnp.float32)  # the shards pad V to a common size


def _shard_index(axes: Sequence[str]) -> jax.Array | int:
    return lax.axis_index(tuple(axes)) if axes else 0
