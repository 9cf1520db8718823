"""The Qwen2-MoE family (Yang et al., 2024): Qwen2's layers, whose MLP is a mixture of experts, and
one more expert, with a gate, that all tokens go through."""

from pdjax.core.model_spec import ModelSpec
from pdjax.core.moe_spec import MoeSpec
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_experts import COUNTS, read_experts
from pdjax.device.checkpoints.hf_features import Windows, stated_window
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.experts import Experts
from pdjax.device.models.qwen2 import Qwen2

ABSENT = COMMON | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
}


class Qwen2Moe(Experts, Qwen2):
    """See `ModelFamily`. No GGUF file of this type is read."""

    name = "qwen2_moe"
    gguf: str | None = None

    def spec(self, config: Fields) -> ModelSpec:
        window = stated_window(config)
        if not config.boolean("use_sliding_window", False):
            window = None
        elif config.get("layer_types") is None:
            raise config.refuse("use_sliding_window", "false, or layer_types beside it")
        bias = config.boolean("qkv_bias", True)
        windows = Windows(window, first=None)
        dense = read_dense(config, self.name, ABSENT, windows, qkv_bias=bias, honoured=COUNTS)
        experts = read_experts(config, dense.num_layers, count=60, used=4, mlp_dim=1408)
        shared = config.integer("shared_expert_intermediate_size", 5632)
        return MoeSpec(**vars(dense), **experts, shared_mlp_dim=shared)
