"""The Phi-3 family (Abdin et al., 2024), which Phi-4 belongs to: Llama's layers, of which files
keep Q, K and V as one tensor and gate and up as another, with LongRoPE (Ding et al., 2024) and, in
some, heads that are rotated in part."""

from dataclasses import replace
from functools import partial

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.gguf_keys import ArchKeys
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows, stated_window
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.checkpoints.hf_rope import TRAINED, read_rope
from pdjax.device.models.family import Tensor
from pdjax.device.models.forms import rotary_order
from pdjax.device.models.llama import Llama

ABSENT = COMMON | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
}
_LONGROPE = {"su": "longrope", "yarn": "longrope"}
"""Names that files of this type have for LongRoPE, beside its own."""


class Phi3(Llama):
    """See `ModelFamily`."""

    name = "phi3"
    gguf: str | None = "phi3"
    gguf_keys = frozenset(["rope.dimension_count", "attention.sliding_window"])
    interleaved = False

    def spec(self, config: Fields) -> ModelSpec:
        rope = partial(read_rope, absent_share=1.0, aliases=_LONGROPE)
        windows = Windows(stated_window(config, absent=None), first=0)
        spec = read_dense(
            *(config, self.name, ABSENT, windows),
            honoured=("partial_rotary_factor",),
            eps=1e-5,
            rope=rope,
        )
        if spec.rope.kind not in ("plain", "longrope"):
            raise ValueError(f"rope_type={spec.rope.kind!r}; allowed: default, longrope")
        if spec.rope.kind == "longrope" and not config.has(TRAINED):
            raise config.refuse(TRAINED, "the context that the model was trained with")
        return spec

    def gguf_spec(self, spec: ModelSpec, keys: ArchKeys) -> ModelSpec:
        """The window counts as it does in transformers; llama.cpp computes without."""
        window = keys.integer("attention.sliding_window", 0)
        if not 0 < window < spec.context:
            return spec
        return replace(spec, window=window, window_layers=tuple(range(spec.num_layers)))

    def qkv(self, spec: ModelSpec, what: str, more_dims: str) -> tuple[Tensor, ...]:
        order = rotary_order(spec.head_dim, spec.rope.rotary_dim, neighbours=False)
        rows = ("KGH", "KH", "KH")
        return tuple(
            Tensor(
                f"self_attn.qkv_proj.{what}",
                f"attn_qkv.{what}",
                own + more_dims,
                order=() if own_place == 2 else order,
                fused=rows,
                place=own_place,
            )
            for own_place, own in enumerate(rows)
        )

    def gate_up(self, spec: ModelSpec) -> tuple[Tensor, Tensor]:
        return fused_gate_up()


def fused_gate_up() -> tuple[Tensor, Tensor]:
    """Return gate and up of a file that keeps them as one tensor."""
    gate, up = (
        Tensor("mlp.gate_up_proj.weight", "ffn_up.weight", "F D", fused=("F", "F"), place=place)
        for place in range(2)
    )
    return gate, up
