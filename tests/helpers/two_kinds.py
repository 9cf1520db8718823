"""Define a made-up family: what a family of models costs is this file, whose last line registers
it.

It is Llama's, but for norms of each head's Q and K, as Qwen3 has them, and layers of two kinds, as
in Gemma 3: every other layer sees a few tokens back only, and has a position embedding of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pdjax.core.model_spec import ModelSpec, RopeSpec
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.family import Layer, LayerKind, Noise, Tensor, Weight
from pdjax.device.models.forms import PLAIN
from pdjax.device.models.llama import Llama
from pdjax.device.models.registry import FAMILIES

ABSENT = COMMON | {"vocab_size": 101, "intermediate_size": 96, "max_position_embeddings": 64}


@dataclass(frozen=True)
class TwoKindsSpec(ModelSpec):
    """Add the numbers of a local layer: tokens of its window, and base of its frequencies."""

    local_window: int = 6
    local_theta: float = 50.0


class TwoKinds(Llama):
    """See `ModelFamily`."""

    name = "two_kinds"
    gguf: str | None = None
    spec_type: type[ModelSpec] = TwoKindsSpec

    def spec(self, config: Fields) -> ModelSpec:
        windows = Windows(None, first=None)
        dense = read_dense(config, self.name, ABSENT, windows, honoured=("qk_norm",))
        return TwoKindsSpec(**vars(dense), local_window=config.integer("window", 6))

    def kinds(self, spec: ModelSpec) -> Sequence[LayerKind]:
        assert isinstance(spec, TwoKindsSpec)
        local = LayerKind(RopeSpec(spec.local_theta), spec.local_window)
        return [(local, LayerKind(spec.rope))[layer % 2] for layer in range(spec.num_layers)]

    def weights(self, spec: ModelSpec, kind: LayerKind) -> Sequence[Weight]:
        norms = [
            Weight(
                f"{part}_norm",
                "H",
                (None,),
                (Tensor(f"self_attn.{part}_norm.weight", "", "H"),),
                PLAIN,
                Noise(stream, gain=2.0, fan_in=None),
            )
            for part, stream in (("q", 20), ("k", 21))
        ]
        return [*super().weights(spec, kind), *norms]

    def block(self, layer: Layer, *rest: Any, **options: Any) -> Any:
        x, scale, cache, attend = rest

        def normed(qkv: jax.Array, scale: jax.Array, bias: Any, *more: Any, **kind: Any) -> Any:
            """Attend as a kernel does that neither scales nor shifts."""
            qkv = qkv * scale[:, None, None, None]
            heads = qkv * lax.rsqrt((qkv**2).mean(-1, keepdims=True) + 1e-6)  # [T, K, J, H]
            q, k = heads[:, :, :-2] * layer["q_norm"], heads[:, :, -2:-1] * layer["k_norm"]
            whole = jnp.concatenate([q, k, qkv[:, :, -1:]], axis=2)
            return attend(whole, jnp.ones_like(scale), None, *more, **kind)

        return super().block(layer, x, scale, cache, normed, **options)


FAMILIES[TwoKinds.name] = TwoKinds()
