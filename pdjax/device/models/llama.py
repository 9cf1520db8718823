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
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows, refuse_biases, stated_window
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.family import (
    EMBED,
    FINAL_NORM,
    UNEMBED,
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
    """

    name = "llama"
    gguf: str | None = "llama"
    spec_type: type[ModelSpec] = ModelSpec
    interleaved = True

    def spec(self, config: Fields) -> ModelSpec:
        refuse_biases(config)
        # No layer has a window, whatever the field says.
        windows = Windows(stated_window(config), first=None)
        return read_dense(config, self.name, ABSENT, windows)

    def kinds(self, spec: ModelSpec) -> Sequence[LayerKind]:
        return [LayerKind(spec.rope)] * spec.num_layers

    def weights(self, spec: ModelSpec, kind: LayerKind) -> Sequence[Weight]:
        """`wqkv`'s columns are grouped by KV head: G query heads, then K, then V, so that Q, K and
        V come from one product. `w_gate_up` holds gate, then up."""
        norms = (
            Tensor("input_layernorm.weight", "attn_norm.weight", "D"),
            Tensor("post_attention_layernorm.weight", "ffn_norm.weight", "D"),
        )
        gate, up, down = (
            Tensor(f"mlp.{part}_proj.weight", f"ffn_{part}.weight", dims)
            for part, dims in (("gate", "F D"), ("up", "F D"), ("down", "D F"))
        )
        out = Tensor("self_attn.o_proj.weight", "attn_output.weight", "D KGH")
        qkv, heads = self._qkv("weight", " D"), (None, "kv_heads")
        weights = [
            Weight("wqkv", "D KJH", heads, qkv, BY_HEAD, Noise(1, gain=3.0), norms[0]),
            Weight("wo", "KGH D", ("kv_heads", None), (out,), TRANSPOSED, Noise(3)),
            Weight(
                "w_gate_up", "D 2 F", (None, None, "mlp"), (gate, up), STACKED, Noise(5), norms[1]
            ),
            Weight("w_down", "F D", ("mlp", None), (down,), TRANSPOSED, Noise(6)),
        ]
        if spec.qkv_bias:
            noise = Noise(2, gain=0.5, fan_in=None)
            bias = self._qkv("bias", "")
            weights.append(Weight("bqkv", "KJH", ("kv_heads",), bias, VECTOR_BY_HEAD, noise))
        return weights

    def _qkv(self, what: str, more_dims: str) -> tuple[Tensor, ...]:
        return tuple(
            Tensor(
                f"self_attn.{part}_proj.{what}",
                f"attn_{part}.{what}",
                rows + more_dims,
                interleaved=self.interleaved and part != "v",
            )
            for part, rows in (("q", "KGH"), ("k", "KH"), ("v", "KH"))
        )

    def planes(self, spec: ModelSpec, kind: LayerKind) -> Planes:
        return k_and_v(spec.kv_heads, spec.head_dim)

    def outside(self, spec: ModelSpec) -> Sequence[Weight]:
        head, vocab = EMBED if spec.tied else UNEMBED, (None, "vocab")
        embed = Weight("embed", "V D", ("vocab", None), (EMBED,), PLAIN, Noise(9, fan_in=1))
        return [
            *([] if spec.tied else [embed]),
            Weight("unembed", "D V", vocab, (head,), TRANSPOSED, Noise(8)),
            Weight("final_norm", "D", (None,), (FINAL_NORM,), PLAIN, noise=None),
        ]

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
    ) -> tuple[jax.Array, jax.Array, Any]:
        heads = (-1, spec.group + 2, spec.head_dim)  # [K, J, H], K of this shard

        def add(x: jax.Array, y: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
            """x + y @ w of all shards, and its scale."""
            if reduce is None:
                return add_product(x, y, w, eps=spec.norm_eps)
            return add_rms(x, reduce(product(y, w)), eps=spec.norm_eps)

        qkv = product(x, layer["wqkv"]).reshape(x.shape[0], *heads)
        bias = layer["bqkv"].reshape(heads) if spec.qkv_bias else None
        o, cache = attend(qkv, scale, bias, cache, kind)  # [T, N, H]
        o = o.reshape(x.shape[0], -1)
        alone = reduce is None and adds_in_place(o, layer["wo"])
        x, scale = add(x, o, layer["wo"])
        hidden = swiglu(x, scale, layer["w_gate_up"], eps=spec.norm_eps if alone else None)
        x, scale = add(x, hidden, layer["w_down"])
        return x, scale, cache
