"""The Gemma 3 family of text models (Kamath et al., 2025): Gemma 2's layers with norms of the heads
of Q and K instead of soft caps, a window in five of six layers, and another base of RoPE there."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp

from pdjax.core.model_spec import ModelSpec, RopeSpec
from pdjax.device.checkpoints.gguf_keys import ArchKeys
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows, stated_window
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.checkpoints.hf_rope import read_rope_of_layers
from pdjax.device.models.family import Layer, LayerKind, Reduce, Weight
from pdjax.device.models.gemma2 import (
    HONOURED,
    Gemma2,
    GemmaSpec,
    gguf_query_scalar,
    refuse_others,
    soft_cap,
    with_window,
)
from pdjax.device.models.norms import norm_heads
from pdjax.device.models.qwen3 import head_norms

ABSENT = COMMON | {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
PATTERN = 6
"""The last of every so many layers sees the whole text, where a file does not say which."""


@dataclass(frozen=True)
class Gemma3Spec(GemmaSpec):
    """Adds `local_rope`, the position embedding of layers with a window."""

    local_rope: RopeSpec = field(default_factory=RopeSpec)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.local_rope, RopeSpec):
            raise ValueError(f"local_rope={self.local_rope!r}: must be a RopeSpec")
        self.local_rope.frequencies(self.head_dim)


class Gemma3(Gemma2):
    """See `ModelFamily`."""

    name = "gemma3_text"
    gguf: str | None = "gemma3"
    gguf_keys = Gemma2.gguf_keys | {"attention.sliding_window_pattern", "rope.freq_base_swa"}
    spec_type: type[ModelSpec] = Gemma3Spec

    def spec(self, config: Fields) -> ModelSpec:
        refuse_others(config)
        pattern = config.integer("sliding_window_pattern", PATTERN)
        windows = Windows(stated_window(config), first=0, whole=pattern)
        if windows.tokens is None:  # whose layers would still have the position embedding of one
            raise config.refuse("sliding_window", "a number of tokens")
        dense = read_dense(
            *(config, self.name, ABSENT, windows),
            honoured=HONOURED,
            tied=True,
            rope=partial(
                read_rope_of_layers,
                layers="full_attention",
                theta="rope_theta",
                absent_theta=1e6,
            ),
        )
        return Gemma3Spec(
            **vars(dense),
            query_scalar=config.number("query_pre_attn_scalar", 256.0),
            attention_soft_cap=soft_cap(config, "attn_logit_softcapping", None),
            logit_soft_cap=soft_cap(config, "final_logit_softcapping", None),
            local_rope=read_rope_of_layers(
                *(config, dense.context, dense.head_dim),
                layers="sliding_attention",
                theta="rope_local_base_freq",
                absent_theta=1e4,
            ),
        )

    def gguf_spec(self, spec: ModelSpec, keys: ArchKeys) -> ModelSpec:
        if not (window := keys.integer("attention.sliding_window", 0)):
            raise ValueError("attention.sliding_window=0: must be at least 1")
        pattern = keys.integer("attention.sliding_window_pattern", PATTERN)
        return Gemma3Spec(
            **vars(with_window(spec, window, pattern)),
            query_scalar=gguf_query_scalar(spec, largest=62),
            attention_soft_cap=keys.number("attn_logit_softcapping", 0.0) or None,
            logit_soft_cap=keys.number("final_logit_softcapping", 0.0) or None,
            local_rope=RopeSpec(keys.number("rope.freq_base_swa", 1e4)),
        )

    def weights(self, spec: ModelSpec, kind: LayerKind) -> Sequence[Weight]:
        return [*super().weights(spec, kind), *head_norms(less_one=True)]

    def kind(self, spec: ModelSpec, layer: int) -> LayerKind:
        assert isinstance(spec, Gemma3Spec), f"a Gemma3Spec, not {type(spec).__name__}"
        kind = super().kind(spec, layer)
        return replace(kind, rope=spec.local_rope) if layer in spec.window_layers else kind

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
