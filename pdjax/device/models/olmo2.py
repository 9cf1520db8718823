"""The OLMo 2 family (OLMo et al., 2024): norms after attention and after the MLP and none before
them, and norms of Q and of K over all heads together."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows, refuse_biases
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.family import Layer, LayerKind, Noise, Reduce, Tensor, Weight
from pdjax.device.models.forms import PLAIN
from pdjax.device.models.post_norms import PostNorms

ABSENT = COMMON | {"vocab_size": 50304, "intermediate_size": 11008, "max_position_embeddings": 2048}


class Olmo2(PostNorms):
    """See `ModelFamily`. GGUF files of this architecture do not interleave Q and K."""

    name = "olmo2"
    gguf: str | None = "olmo2"
    interleaved = False
    pre_norms = (None, None)
    post_norms = (
        Tensor("post_attention_layernorm.weight", "post_attention_norm.weight", "D"),
        Tensor("post_feedforward_layernorm.weight", "post_ffw_norm.weight", "D"),
    )

    def spec(self, config: Fields) -> ModelSpec:
        refuse_biases(config, ("attention_bias",))
        return read_dense(config, self.name, ABSENT, Windows(None, first=None), eps=1e-5)

    def weights(self, spec: ModelSpec, kind: LayerKind) -> Sequence[Weight]:
        norms = [
            Weight(
                f"{part}_norm",
                rows,
                ("kv_heads",),
                (Tensor(f"self_attn.{part}_norm.weight", f"attn_{part}_norm.weight", rows),),
                PLAIN,
                Noise(stream, gain=2.0, fan_in=None),
            )
            for part, rows, stream in (("q", "KGH", 10), ("k", "KH", 11))
        ]
        return [*super().weights(spec, kind), *norms]

    def heads(
        self,
        layer: Layer,
        qkv: jax.Array,
        scale: jax.Array,
        spec: ModelSpec,
        reduce: Reduce | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        wide = qkv.astype(jnp.float32)  # no norm comes before: the scale is 1
        q, k, v = wide[:, :, :-2], wide[:, :, -2:-1], wide[:, :, -1:]
        squares = jnp.stack([jnp.square(part).sum((1, 2, 3)) for part in (q, k)], axis=1)  # [T, 2]
        if reduce is not None:
            squares = reduce(squares)
        sizes = jnp.array([spec.query_heads, spec.kv_heads], jnp.float32) * spec.head_dim
        scales = lax.rsqrt(squares / sizes + spec.norm_eps)[:, :, None, None, None]
        q *= scales[:, 0] * layer["q_norm"].astype(jnp.float32).reshape(q.shape[1:])
        k *= scales[:, 1] * layer["k_norm"].astype(jnp.float32).reshape(k.shape[1:])
        return jnp.concatenate([q, k, v], axis=2).astype(qkv.dtype), scale, None
