"""The GLM family (GLM et al., 2024), which GLM-4-9B belongs to: Llama's layers with biases of Q, K
and V, heads that are rotated in part and by neighbouring dimensions, and gate and up in one
tensor."""

from dataclasses import replace
from functools import partial

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.checkpoints.hf_rope import read_rope
from pdjax.device.models.family import Tensor
from pdjax.device.models.forms import rotary_order
from pdjax.device.models.llama import Llama
from pdjax.device.models.phi3 import fused_gate_up

ABSENT = COMMON | {
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}


class Glm(Llama):
    """See `ModelFamily`. No GGUF file of this type is read."""

    name = "glm"
    gguf: str | None = None
    interleaved = False

    def spec(self, config: Fields) -> ModelSpec:
        return read_dense(
            *(config, self.name, ABSENT, Windows(None, first=None)),
            qkv_bias=config.boolean("attention_bias", True),
            honoured=("partial_rotary_factor",),
            eps=1.5625e-07,
            rope=partial(read_rope, absent_share=0.5),
        )

    def qkv(self, spec: ModelSpec, what: str, more_dims: str) -> tuple[Tensor, ...]:
        order = rotary_order(spec.head_dim, spec.rope.rotary_dim, neighbours=True)
        q, k, v = super().qkv(spec, what, more_dims)
        return replace(q, order=order), replace(k, order=order), v

    def gate_up(self, spec: ModelSpec) -> tuple[Tensor, Tensor]:
        return fused_gate_up()
