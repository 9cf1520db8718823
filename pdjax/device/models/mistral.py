"""The Mistral family (Jiang et al., 2023): Llama's layers with a window, unless a Hugging Face file
says that they have none."""

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows, stated_window
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.llama import Llama

ABSENT = COMMON | {
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
}


class Mistral(Llama):
    """See `ModelFamily`. GGUF files of these models say that they are Llama's."""

    name = "mistral"
    gguf: str | None = None

    def spec(self, config: Fields) -> ModelSpec:
        return read_dense(config, self.name, ABSENT, Windows(stated_window(config), first=0))
