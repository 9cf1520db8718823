"""The Mixtral family (Jiang et al., 2024): Mistral's layers, whose MLP is a mixture of experts."""

from pdjax.core.model_spec import ModelSpec
from pdjax.core.moe_spec import MoeSpec
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_experts import COUNTS, count_of_experts
from pdjax.device.checkpoints.hf_features import Windows, stated_window
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.experts import Experts

ABSENT = COMMON | {
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
}


class Mixtral(Experts):
    """See `ModelFamily`. GGUF files of these models say that they are Llama's, with experts."""

    name = "mixtral"
    folder = "block_sparse_moe"
    parts = ("w1", "w3", "w2")

    def spec(self, config: Fields) -> ModelSpec:
        windows = Windows(stated_window(config, absent=None), first=0)
        dense = read_dense(config, self.name, ABSENT, windows, honoured=COUNTS, eps=1e-5)
        return MoeSpec(
            **vars(dense),
            num_experts=count_of_experts(config, 8),
            experts_per_token=config.integer("num_experts_per_tok", 2),
            expert_mlp_dim=dense.mlp_dim,
        )
