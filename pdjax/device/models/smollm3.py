"""The SmolLM3 family (Bakouch et al., 2025): Llama's layers, some of them without a position
embedding (NoPE, Kazemnejad et al., 2023)."""

from dataclasses import dataclass, replace
from functools import partial

from pdjax.core.model_spec import ModelSpec, RopeSpec, check_layers
from pdjax.device.checkpoints.gguf_keys import ArchKeys
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows, refuse_biases
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.checkpoints.hf_rope import read_rope
from pdjax.device.models.family import LayerKind
from pdjax.device.models.llama import Llama

ABSENT = COMMON | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
INTERVAL = 4
"""The last of every so many layers has no position embedding, where a file does not say which."""

_HONOURED = ("no_rope_layers", "no_rope_layer_interval")


@dataclass(frozen=True)
class SmolLM3Spec(ModelSpec):
    """Adds `unrotated`, the layers without a position embedding."""

    unrotated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers("unrotated", self.unrotated, self.num_layers)


class SmolLM3(Llama):
    """See `ModelFamily`."""

    name = "smollm3"
    gguf: str | None = "smollm3"
    spec_type: type[ModelSpec] = SmolLM3Spec

    def spec(self, config: Fields) -> ModelSpec:
        refuse_biases(config)
        if config.boolean("use_sliding_window", False):
            raise config.refuse("use_sliding_window", "false")
        rope = partial(read_rope, absent_theta=2e6)
        windows = Windows(None, first=None)
        dense = read_dense(
            config, self.name, ABSENT, windows, honoured=_HONOURED, tied=True, rope=rope
        )
        return SmolLM3Spec(**vars(dense), unrotated=_unrotated(config, dense.num_layers))

    def gguf_spec(self, spec: ModelSpec, keys: ArchKeys) -> ModelSpec:
        """No key says which layers have no position embedding: llama.cpp takes INTERVAL for all."""
        unrotated = tuple(range(INTERVAL - 1, spec.num_layers, INTERVAL))
        return SmolLM3Spec(**vars(spec), unrotated=unrotated)

    def kind(self, spec: ModelSpec, layer: int) -> LayerKind:
        assert isinstance(spec, SmolLM3Spec), f"a SmolLM3Spec, not {type(spec).__name__}"
        kind = super().kind(spec, layer)
        return replace(kind, rope=RopeSpec(kind="none")) if layer in spec.unrotated else kind


def _unrotated(config: Fields, layers: int) -> tuple[int, ...]:
    """The layers without a position embedding, as the file says: 1 is a layer that has one."""
    found = config.get("no_rope_layers")
    if found is None:
        interval = config.integer("no_rope_layer_interval", INTERVAL)
        return tuple(range(interval - 1, layers, interval))
    if not isinstance(found, list) or len(found) != layers or any(x not in (0, 1) for x in found):
        raise config.refuse("no_rope_layers", f"0 or 1 for each of num_hidden_layers={layers}")
    return tuple(layer for layer, rotated in enumerate(found) if not rotated)
