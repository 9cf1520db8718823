"""The Llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU (Touvron et al., 2023). Families
that differ from it in numbers or in a weight build on it.

RMSNorm is `x * r * weight` with one scalar r a token. Inside the layers it has no pass of its own:
the weight is multiplied into the rows of the matrix that follows when weights are loaded, and r,
which commutes with the product, is applied after it. In real arithmetic that is exact. In bfloat16
it rounds the folded weights once, where the usual order rounds the normalized activations twice.

Dimension key: T tokens, D model dim, N query heads, K KV heads, G = N/K, J = G + 2, H head dim, F
MLP dim, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.add_rms.api import add_rms
from pallas_kernels.product.api import add_product, adds_in_place, product
from pallas_kernels.swiglu.api import swiglu
from pdjax.core.kv_layout import Planes, k_and_v
from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.gguf_keys import ArchKeys
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows, refuse_biases, stated_window
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.family import (
    EMBED,
    FINAL_NORM,
    UNEMBED,
    Around,
    Attend,
    Layer,
    LayerKind,
    Noise,
    Reduce,
    Tensor,
    Weight,
)
from pdjax.device.models.forms import BY_HEAD, PLAIN, STACKED, TRANSPOSED, VECTOR_BY_HEAD

ABSENT = COMMON | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}


class Llama:
    """See `ModelFamily`.

    Attributes:
      interleaved: whether GGUF files of this architecture interleave the rows of Q and K.
      pre_norms: the norms before attention and before the MLP; None where there is none.
      final_norm: the norm before the output matrix.
    """

    name = "llama"
    gguf: str | None = "llama"
    experts = False
    gguf_keys: frozenset[str] = frozenset()
    spec_type: type[ModelSpec] = ModelSpec
    interleaved = True
    pre_norms: tuple[Tensor | None, Tensor | None] = (
        Tensor("input_layernorm.weight", "attn_norm.weight", "D"),
        Tensor("post_attention_layernorm.weight", "ffn_norm.weight", "D"),
    )
    final_norm = FINAL_NORM

    def spec(self, config: Fields) -> ModelSpec:
        refuse_biases(config)
        # No layer has a window, whatever the field says.
        windows = Windows(stated_window(config), first=None, honoured=False)
        return read_dense(config, self.name, ABSENT, windows)

    def gguf_spec(self, spec: ModelSpec, keys: ArchKeys) -> ModelSpec:
        return spec

    def kinds(self, spec: ModelSpec) -> Sequence[LayerKind]:
        return [self.kind(spec, layer) for layer in range(spec.num_layers)]

    def kind(self, spec: ModelSpec, layer: int) -> LayerKind:
        """Return the kind of a layer."""
        return LayerKind(spec.rope, spec.window if layer in spec.window_layers else None)

    def weights(self, spec: ModelSpec, kind: LayerKind) -> Sequence[Weight]:
        """`wqkv`'s columns are grouped by KV head: G query heads, then K, then V, so that Q, K and
        V come from one product."""
        out = Tensor("self_attn.o_proj.weight", "attn_output.weight", "D KGH")
        qkv, heads, norm = self.qkv(spec, "weight", " D"), (None, "kv_heads"), self.pre_norms[0]
        added = self.residual_scale(spec)
        weights = [
            Weight("wqkv", "D KJH", heads, qkv, BY_HEAD, Noise(1, gain=3.0), norm),
            Weight("wo", "KGH D", ("kv_heads", None), (out,), TRANSPOSED, Noise(3), factor=added),
            *self.mlp_weights(spec, kind),
        ]
        if spec.qkv_bias:
            noise = Noise(2, gain=0.5, fan_in=None)
            bias = self.qkv(spec, "bias", "")
            weights.append(Weight("bqkv", "KJH", ("kv_heads",), bias, VECTOR_BY_HEAD, noise))
        return weights

    def mlp_weights(self, spec: ModelSpec, kind: LayerKind) -> Sequence[Weight]:
        """Declare those of the MLP. `w_gate_up` holds gate, then up."""
        down = Tensor("mlp.down_proj.weight", "ffn_down.weight", "D F")
        gate_up, norm, added = self.gate_up(spec), self.pre_norms[1], self.residual_scale(spec)
        return [
            Weight("w_gate_up", "D 2 F", (None, None, "mlp"), gate_up, STACKED, Noise(5), norm),
            Weight("w_down", "F D", ("mlp", None), (down,), TRANSPOSED, Noise(6), factor=added),
        ]

    def qkv(self, spec: ModelSpec, what: str, more_dims: str) -> tuple[Tensor, ...]:
        """Return the tensors of the projections to Q, K and V: their "weight" or their "bias"."""
        return tuple(
            Tensor(
                f"self_attn.{part}_proj.{what}",
                f"attn_{part}.{what}",
                rows + more_dims,
                interleaved=self.interleaved and part != "v",
            )
            for part, rows in (("q", "KGH"), ("k", "KH"), ("v", "KH"))
        )

    def gate_up(self, spec: ModelSpec) -> tuple[Tensor, Tensor]:
        """Return the tensors of the first half of the MLP."""
        return (
            Tensor("mlp.gate_proj.weight", "ffn_gate.weight", "F D"),
            Tensor("mlp.up_proj.weight", "ffn_up.weight", "F D"),
        )

    def residual_scale(self, spec: ModelSpec) -> float:
        """Return what multiplies the results of attention and of the MLP before they are added. It
        is multiplied into weights."""
        return 1.0

    def logit_scale(self, spec: ModelSpec) -> float:
        """Return what multiplies the logits. It is multiplied into the weight of the last norm."""
        return 1.0

    def planes(self, spec: ModelSpec, kind: LayerKind) -> Planes:
        return k_and_v(spec.kv_heads, spec.head_dim)

    def outside(self, spec: ModelSpec) -> Sequence[Weight]:
        head, vocab = EMBED if spec.tied else UNEMBED, (None, "vocab")
        embed = Weight("embed", "V D", ("vocab", None), (EMBED,), PLAIN, Noise(9, fan_in=1))
        return [
            *([] if spec.tied else [embed]),
            Weight("unembed", "D V", vocab, (head,), TRANSPOSED, Noise(8)),
            Weight(
                *("final_norm", "D", (None,), (self.final_norm,), PLAIN, None),
                factor=self.logit_scale(spec),
            ),
        ]

    def around(self, spec: ModelSpec) -> Around:
        return Around()

    def heads(
        self,
        layer: Layer,
        qkv: jax.Array,
        scale: jax.Array,
        spec: ModelSpec,
        reduce: Reduce | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Return qkv [T, K, J, H], its scale f32[T] and its bias [K, J, H] as attention takes them,
        from qkv and the scale of the product."""
        return qkv, scale, layer["bqkv"].reshape(qkv.shape[1:]) if spec.qkv_bias else None

    def block(
        self,
        layer: Layer,
        x: jax.Array,
        scale: jax.Array,
        cache: Any,
        attend: Attend,
        *,
        spec: ModelSpec,
        kind: LayerKind,
        reduce: Reduce | None,
        live: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        heads = (-1, spec.group + 2, spec.head_dim)  # [K, J, H], K of this shard
        qkv = product(x, layer["wqkv"]).reshape(x.shape[0], *heads)
        o, cache = attend(*self.heads(layer, qkv, scale, spec, reduce), cache, kind)  # [T, N, H]
        o = o.reshape(x.shape[0], -1)
        alone = reduce is None and adds_in_place(o, layer["wo"])
        x, scale = add_all(x, o, layer["wo"], spec, reduce)
        x, scale = self.mlp(layer, x, scale, spec, kind, reduce, live, alone=alone)
        return x, scale, cache

    def mlp(
        self,
        layer: Layer,
        x: jax.Array,
        scale: jax.Array,
        spec: ModelSpec,
        kind: LayerKind,
        reduce: Reduce | None,
        live: jax.Array | None,
        *,
        alone: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the residual stream after the MLP, and its scale.

        Args:
          alone: whether nothing else needs `scale`, so that a kernel may compute it itself.
        """
        hidden = swiglu(x, scale, layer["w_gate_up"], eps=spec.norm_eps if alone else None)
        return add_all(x, hidden, layer["w_down"], spec, reduce)


def add_all(
    x: jax.Array, y: jax.Array, w: jax.Array, spec: ModelSpec, reduce: Reduce | None
) -> tuple[jax.Array, jax.Array]:
    """Return x + y @ w of all shards, and its scale."""
    if reduce is None:
        return add_product(x, y, w, eps=spec.norm_eps)
    return add_rms(x, reduce(product(y, w)), eps=spec.norm_eps)
