"""The Gemma 2 family (Riviere et al., 2024): layers sandwiched between norms, GeGLU, soft caps of
scores and logits, and a window in every other layer. Files hold the weights of norms less 1."""

from dataclasses import dataclass, replace

from pdjax.core.model_spec import ModelSpec, check_positive
from pdjax.device.checkpoints.hf_dense import COMMON, read_dense
from pdjax.device.checkpoints.hf_features import Windows, refuse_biases, stated_window
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.family import FINAL_NORM, Around, LayerKind, Tensor
from pdjax.device.models.post_norms import PostNorms

ABSENT = COMMON | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
}
GELU = "gelu_pytorch_tanh"
HONOURED = (
    "hidden_act",  # transformers reads `hidden_activation`
    "hidden_activation",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


@dataclass(frozen=True)
class GemmaSpec(ModelSpec):
    """Adds the scale and the soft caps.

    Attributes:
      query_scalar: the products of Q and K are divided by its square root.
      attention_soft_cap: of the scores; None: there is none.
      logit_soft_cap: of the logits; None: there is none.
    """

    query_scalar: float = 256.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("query_scalar", self.query_scalar)
        for name in ("attention_soft_cap", "logit_soft_cap"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))


def gemma(spec: ModelSpec) -> GemmaSpec:
    """Return the spec, which is a GemmaSpec."""
    assert isinstance(spec, GemmaSpec), f"a GemmaSpec, not {type(spec).__name__}"
    return spec


def _norm(name: str, gguf: str) -> Tensor:
    return Tensor(f"{name}_layernorm.weight", f"{gguf}.weight", "D", less_one=True)


class Gemma2(PostNorms):
    """See `ModelFamily`. GGUF files of this architecture do not interleave Q and K, and hold the
    weights of norms as they are."""

    name = "gemma2"
    gguf: str | None = None
    spec_type: type[ModelSpec] = GemmaSpec
    interleaved = False
    pre_norms = (_norm("input", "attn_norm"), _norm("pre_feedforward", "ffn_norm"))
    post_norms = (
        _norm("post_attention", "post_attention_norm"),
        _norm("post_feedforward", "post_ffw_norm"),
    )
    final_norm = replace(FINAL_NORM, less_one=True)
    activation = "gelu_tanh"

    def spec(self, config: Fields) -> ModelSpec:
        windows = Windows(stated_window(config), first=0, whole=2)
        refuse_others(config)
        dense = read_dense(config, self.name, ABSENT, windows, honoured=HONOURED, tied=True)
        return GemmaSpec(
            **vars(dense),
            query_scalar=config.number("query_pre_attn_scalar", 256.0),
            attention_soft_cap=soft_cap(config, "attn_logit_softcapping", 50.0),
            logit_soft_cap=soft_cap(config, "final_logit_softcapping", 30.0),
        )

    def kind(self, spec: ModelSpec, layer: int) -> LayerKind:
        own = gemma(spec)
        scale, cap = own.query_scalar**-0.5, own.attention_soft_cap
        return replace(super().kind(spec, layer), scale=scale, soft_cap=cap)

    def around(self, spec: ModelSpec) -> Around:
        return Around(spec.model_dim**0.5, gemma(spec).logit_soft_cap)


def refuse_others(config: Fields) -> None:
    """Refuse what Gemma's files may ask for and the families do not compute."""
    refuse_biases(config, ("attention_bias",))
    if config.get("hidden_activation", GELU) != GELU:
        raise config.refuse("hidden_activation", GELU)


def soft_cap(config: Fields, name: str, absent: float | None) -> float | None:
    """A soft cap: null is none, and no field what transformers takes for it."""
    if not config.has(name):
        return absent
    return None if config.get(name) is None else config.number(name)
