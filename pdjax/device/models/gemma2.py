"""The Gemma 2 family (Riviere et al., 2024): layers sandwiched between norms, GeGLU, soft caps of
scores and logits, and a window in every other layer. Files hold the weights of norms less 1."""

from dataclasses import dataclass, replace

from pdjax.core.model_spec import ModelSpec, check_positive
from pdjax.device.checkpoints.gguf_keys import ArchKeys
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
    gguf: str | None = "gemma2"
    gguf_keys = frozenset(
        ["attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"]
    )
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

    def gguf_spec(self, spec: ModelSpec, keys: ArchKeys) -> ModelSpec:
        return GemmaSpec(
            **vars(with_window(spec, keys.integer("attention.sliding_window", 4096), 2)),
            query_scalar=gguf_query_scalar(spec, largest=46),
            attention_soft_cap=keys.number("attn_logit_softcapping", 50.0) or None,
            logit_soft_cap=keys.number("final_logit_softcapping", 30.0) or None,
        )

    def kind(self, spec: ModelSpec, layer: int) -> LayerKind:
        own = gemma(spec)
        scale, cap = own.query_scalar**-0.5, own.attention_soft_cap
        return replace(super().kind(spec, layer), scale=scale, soft_cap=cap)

    def around(self, spec: ModelSpec) -> Around:
        return Around(spec.model_dim**0.5, gemma(spec).logit_soft_cap)


def with_window(spec: ModelSpec, window: int, whole: int) -> ModelSpec:
    """Return the spec with a window of so many tokens, 0 for none, in all layers but the last of
    every `whole`.

    Raises:
      ValueError: `whole` is not positive.
    """
    if whole < 1:
        raise ValueError(f"attention.sliding_window_pattern={whole}: must be at least 1")
    layers = tuple(layer for layer in range(spec.num_layers) if (layer + 1) % whole)
    return replace(spec, window=window if 0 < window < spec.context else None, window_layers=layers)


def gguf_query_scalar(spec: ModelSpec, largest: int) -> float:
    """Return what no key of Gemma's GGUF files says. llama.cpp knows the largest model, whose
    scalar is not its head dim, by its number of layers."""
    if spec.num_layers == largest:
        return spec.model_dim / spec.query_heads
    return float(spec.head_dim)


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
