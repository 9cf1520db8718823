"""The Granite family (IBM, 2024): Llama's layers, with factors of the embeddings, of the scores of
attention, of what layers add, and of the logits."""

from dataclasses import dataclass, replace

from pdjax.core.model_spec import ModelSpec, check_positive
from pdjax.device.checkpoints.gguf_keys import ArchKeys
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows, refuse_biases
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.family import Around, LayerKind
from pdjax.device.models.llama import Llama

ABSENT = COMMON | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
FACTORS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


@dataclass(frozen=True)
class GraniteSpec(ModelSpec):
    """Adds the factors.

    Attributes:
      embedding_multiplier: of the embeddings.
      attention_multiplier: of the products of Q and K, instead of H ** -0.5.
      residual_multiplier: of what attention and the MLP return; weights hold it.
      logits_scaling: the logits are divided by it; the weight of the last norm holds it.
    """

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in FACTORS:
            check_positive(name, getattr(self, name))


def _granite(spec: ModelSpec) -> GraniteSpec:
    assert isinstance(spec, GraniteSpec), f"a GraniteSpec, not {type(spec).__name__}"
    return spec


class Granite(Llama):
    """See `ModelFamily`."""

    name = "granite"
    gguf: str | None = "granite"
    gguf_keys = frozenset(["attention.scale", "embedding_scale", "residual_scale", "logit_scale"])
    spec_type: type[ModelSpec] = GraniteSpec

    def spec(self, config: Fields) -> ModelSpec:
        refuse_biases(config)
        windows = Windows(None, first=None)
        dense = read_dense(config, self.name, ABSENT, windows, honoured=FACTORS)
        return GraniteSpec(**vars(dense) | {name: config.number(name, 1.0) for name in FACTORS})

    def gguf_spec(self, spec: ModelSpec, keys: ArchKeys) -> ModelSpec:
        """llama.cpp takes a factor of 0 for none, and none of attention for H ** -0.5."""
        return GraniteSpec(
            **vars(spec),
            attention_multiplier=keys.number("attention.scale", 0.0) or keys.head_dim**-0.5,
            embedding_multiplier=keys.number("embedding_scale", 1.0) or 1.0,
            residual_multiplier=keys.number("residual_scale", 1.0) or 1.0,
            logits_scaling=keys.number("logit_scale", 1.0) or 1.0,
        )

    def kind(self, spec: ModelSpec, layer: int) -> LayerKind:
        return replace(super().kind(spec, layer), scale=_granite(spec).attention_multiplier)

    def around(self, spec: ModelSpec) -> Around:
        return Around(embed_scale=_granite(spec).embedding_multiplier)

    def residual_scale(self, spec: ModelSpec) -> float:
        return _granite(spec).residual_multiplier

    def logit_scale(self, spec: ModelSpec) -> float:
        return 1 / _granite(spec).logits_scaling
