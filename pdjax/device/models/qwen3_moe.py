"""The Qwen3-MoE family (Yang et al., 2025): Qwen3's layers, whose MLP is a mixture of experts, in
some files not in all of them."""

from pdjax.core.model_spec import ModelSpec
from pdjax.core.moe_spec import MoeSpec
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_experts import COUNTS, read_experts
from pdjax.device.checkpoints.hf_features import Windows, refuse_biases, stated_window
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.experts import Experts
from pdjax.device.models.qwen3 import Qwen3

ABSENT = COMMON | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}


class Qwen3Moe(Experts, Qwen3):
    """See `ModelFamily`. GGUF files of this architecture do not interleave Q and K."""

    name = "qwen3_moe"
    gguf: str | None = "qwen3moe"

    def spec(self, config: Fields) -> ModelSpec:
        refuse_biases(config, ("attention_bias",))  # the output projection would have one, too
        window = stated_window(config)
        if not config.boolean("use_sliding_window", False):
            window = None
        windows = Windows(window, first=0)
        dense = read_dense(config, self.name, ABSENT, windows, honoured=COUNTS)
        experts = read_experts(config, dense.num_layers, count=128, used=8, mlp_dim=768)
        return MoeSpec(**vars(dense), **experts)
