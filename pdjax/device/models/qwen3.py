"""The Qwen3 family (Yang et al., 2025): Llama's layers, and norms of the heads of Q and K."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import (
    Windows,
    first_window_layer,
    refuse_biases,
    stated_window,
)
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.family import Layer, LayerKind, Noise, Reduce, Tensor, Weight
from pdjax.device.models.forms import PLAIN
from pdjax.device.models.llama import Llama
from pdjax.device.models.norms import norm_heads

ABSENT = COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "head_dim": 128,
}


class Qwen3(Llama):
    """See `ModelFamily`. GGUF files of this architecture do not interleave Q and K."""

    name = "qwen3"
    gguf: str | None = "qwen3"
    interleaved = False

    def spec(self, config: Fields) -> ModelSpec:
        refuse_biases(config, ("attention_bias",))  # the output projection would have one, too
        window = stated_window(config)
        if not config.boolean("use_sliding_window", False):
            window = None
        return read_dense(config, self.name, ABSENT, Windows(window, first_window_layer(config)))

    def weights(self, spec: ModelSpec, kind: LayerKind) -> Sequence[Weight]:
        return [*super().weights(spec, kind), *head_norms()]

    def heads(
        self,
        layer: Layer,
        qkv: jax.Array,
        scale: jax.Array,
        spec: ModelSpec,
        reduce: Reduce | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        normed = norm_heads(qkv, scale, layer["q_norm"], layer["k_norm"], spec.norm_eps)
        return normed, jnp.ones_like(scale), None


def head_norms(less_one: bool = False) -> list[Weight]:
    """Return the weights of the norms of Q's and of K's heads; `less_one` as in `Tensor`."""
    weights = []
    for part, stream in (("q", 10), ("k", 11)):
        names = f"self_attn.{part}_norm.weight", f"attn_{part}_norm.weight"
        norm = Tensor(*names, "H", less_one=less_one)
        noise = Noise(stream, gain=2.0, fan_in=None)
        weights.append(Weight(f"{part}_norm", "H", (None,), (norm,), PLAIN, noise))
    return weights
