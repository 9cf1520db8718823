"""The Qwen2 family (Yang et al., 2024): Llama's layers, and biases of Q, K and V."""

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows, first_window_layer, stated_window
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.llama import Llama

ABSENT = COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}


class Qwen2(Llama):
    """See `ModelFamily`. GGUF files of this architecture do not interleave Q and K."""

    name = "qwen2"
    gguf: str | None = "qwen2"
    interleaved = False

    def spec(self, config: Fields) -> ModelSpec:
        window = stated_window(config)
        if not config.boolean("use_sliding_window", False):
            window = None
        windows = Windows(window, first_window_layer(config))
        return read_dense(config, self.name, ABSENT, windows, qkv_bias=True)
