"""Features of models that this project does not compute, by the fields of `config.json` that turn
them on.

transformers ignores fields that the named model type does not have, so that a Granite whose type
says "llama" loads there and answers wrongly. Here such a field is refused, unless its value changes
nothing. Fields that no model type knows pass: they are notes of whoever wrote the file.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pdjax.device.checkpoints.hf_fields import Fields

ACTIVATIONS = ("silu", "swish")  # two names of one function
QUANTIZATIONS = ("quantization_config", "compression_config", "quantization")
ABSENT_WINDOW = 4096

_OFF: dict[str, tuple[Any, ...]] = {
    name: (False, 0, [], None)
    for name in (
        "add_cross_attention",
        "alibi",
        "attention_chunk_size",
        "attn_logit_softcapping",
        "attn_temperature_tuning",
        "block_configs",
        "clip_qkv",
        "final_logit_softcapping",
        "interleaved_rope",
        "is_encoder_decoder",
        "kv_lora_rank",
        "kv_sharing_modes",
        "moe_layers",
        "n_routed_experts",
        "no_rope_layer_interval",
        "no_rope_layers",
        "num_experts",
        "num_kv_shared_layers",
        "num_local_experts",
        "per_layer_config",
        "q_lora_rank",
        "qk_layernorm",
        "qk_norm",
        "rope_interleave",
        "rope_interleaved",
        "use_alibi",
        "use_bidirectional_attention",
        "use_dynamic_ntk",
        "use_logn_attn",
        "use_parallel_residual",
        "use_qk_norm",
    )
}
"""Features that are off where the field is absent or has one of these values."""

_NEUTRAL = _OFF | {
    "hidden_activation": (*ACTIVATIONS, None),
    "is_causal": (True, None),
    "logit_scale": (1.0, None),
    "logits_scaling": (1.0, None),
    "partial_rotary_factor": (1.0, None),
    "position_embedding_type": ("rope", "rotary", "absolute", None),
    "rope_ratio": (1.0, None),
    "rotary_pct": (1.0, None),
    "scale_depth": (None,),
    "scale_emb": (1.0, None),
    "use_rope": (True, None),
}

_FACTORS = ("_multiplier", "_multipliers")
_NO_FACTORS = ("ffn_dim_multiplier",)  # a note of how intermediate_size was found


def refuse_features(
    config: Fields, *, width: int, head_dim: int, honoured: Collection[str] = ()
) -> None:
    """Refuse a configuration that asks for what its family does not compute: anything but what
    Llama computes, and the fields `honoured`.

    Raises:
      ValueError: naming the field, its value, and what is allowed.
    """
    _refuse_quantization(config)
    if "hidden_act" not in honoured and config.get("hidden_act", "silu") not in ACTIVATIONS:
        raise config.refuse("hidden_act", ", ".join(ACTIVATIONS))
    for name, neutral in _NEUTRAL.items():
        if name not in honoured and not _one_of(config.get(name), neutral):
            values = [repr(value) for value in neutral if value is not None]
            raise config.refuse(name, ", ".join([*values, "or no such field"]))
    sizes = {
        "attention_multiplier": head_dim**-0.5,
        "query_pre_attn_scalar": head_dim,
        "rotary_dim": head_dim,
        "dim_model_base": width,
    }
    for name, value in sizes.items():
        if name in honoured:
            continue
        if config.get(name) is not None and not _close(config.get(name), value):
            raise config.refuse(name, f"{value:g}, or no such field")
    for name in config.names():
        if name.endswith(_FACTORS) and name not in (*_NO_FACTORS, *sizes, *honoured):
            factors = config.get(name, 1.0)
            each = factors if isinstance(factors, list) else [factors]
            if not all(_close(factor, 1.0) for factor in each):
                raise config.refuse(name, "1.0, or no such field")


def refuse_biases(config: Fields, names: Collection[str] = ("mlp_bias", "attention_bias")) -> None:
    """Refuse biases where a field of Llama's asks for them: the output projection would have one as
    well. Qwen2's biases come with its type, and Mistral has none whatever the field says."""
    for name in names:
        if config.boolean(name, False):
            raise config.refuse(name, "false")


def _one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether `value` is allowed; True and 1 are not the same, 1.0 and 1 are."""
    return any(
        value == other and isinstance(value, bool) is isinstance(other, bool) for other in allowed
    )


def _close(value: Any, other: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared and not subtracted: an integer may be too large for a float.
    return number and 0.999999 * other <= value <= 1.000001 * other


def _refuse_quantization(config: Fields) -> None:
    for name in QUANTIZATIONS:
        value = config.get(name)
        if value is None:
            continue
        allowed = "none; load float weights, or a GGUF file"
        if isinstance(value, dict) and isinstance(value.get("quant_method"), str):
            raise config.object(name).refuse("quant_method", allowed)
        raise config.refuse(name, allowed)


@dataclass(frozen=True)
class Windows:
    """What a model type understands a file to say of sliding windows.

    Attributes:
      tokens: of a window; None where there is none.
      first: the first layer with a window, where no field says so for each layer; None: none has.
      whole: where no field says so, the last of every so many layers has no window; None: all have.
      honoured: whether the family computes with windows.
    """

    tokens: int | None
    first: int | None
    whole: int | None = None
    honoured: bool = True


def stated_window(config: Fields, absent: int | None = ABSENT_WINDOW) -> int | None:
    """Tokens of a window: the field, null for none, or what transformers takes for no field."""
    if config.has("sliding_window"):
        written = config.get("sliding_window") is not None
        return config.integer("sliding_window") if written else None
    return absent


def read_windows(
    config: Fields, windows: Windows, *, layers: int, context: int
) -> tuple[int | None, tuple[int, ...]]:
    """Tokens of the window, None where no sequence outgrows it, and the layers that have it.

    Raises:
      ValueError: the family does not compute with the window, or layers have one of no tokens.
    """
    types, window = _layer_types(config, layers), windows.tokens
    if types is not None:
        used = [layer for layer, kind in enumerate(types) if kind == "sliding_attention"]
        if used and window is None:
            raise config.refuse("layer_types", "full_attention where there is no sliding_window")
    else:
        after = range(layers if windows.first is None else windows.first, layers)
        used = [layer for layer in after if not windows.whole or (layer + 1) % windows.whole]
    if window is None:
        return None, ()
    if window >= context or not used:
        return None, tuple(used)
    if not windows.honoured:
        raise config.refuse("sliding_window", f"null, or at least the context of {context}")
    return window, tuple(used)


def first_window_layer(config: Fields) -> int | None:
    """The first layer with a window, where `layer_types` does not say it of each."""
    if config.get("layer_types") is not None:
        return None
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise config.refuse("max_window_layers", "an integer, 0 or more")
    return first


def _layer_types(config: Fields, layers: int) -> list[str] | None:
    """The attention of each layer where the file says so, "attention" meaning all of it."""
    types = config.get("layer_types")
    mlps = config.get("mlp_layer_types")
    if mlps is not None and (not isinstance(mlps, list) or any(t != "dense" for t in mlps)):
        raise config.refuse("mlp_layer_types", "dense for each layer, or no such field")
    if types is None:
        return None
    known = ("full_attention", "attention", "sliding_attention")
    if not isinstance(types, list) or not all(t in known for t in types):
        raise config.refuse("layer_types", ", ".join(known))
    if len(types) != layers:
        raise config.refuse("layer_types", f"one for each of num_hidden_layers={layers}")
    return types
