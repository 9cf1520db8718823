"""`config.json` of a Hugging Face directory -> ModelSpec, refusing what this project does not
compute.

A field that changes the arithmetic is either honoured or refused by name: a model that loads and
answers almost right is the worst outcome.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdjax.end_tokens import stated_end_token_ids
from pdjax.json_file import read_json
from pdjax.model_spec import ModelSpec, RopeSpec

CONFIG_FILE = "config.json"
MODEL_TYPES = ("llama", "mistral", "qwen2")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def read_spec(directory: Path) -> ModelSpec:
    """The architecture that `config.json` in `directory` describes.

    Raises:
      ValueError: naming the field that is missing, malformed or not supported, its value, and what
        is allowed.
    """
    config = _Fields(f"{directory / CONFIG_FILE}:", read_json(directory / CONFIG_FILE))
    _refuse_features(config)
    heads = config.integer("num_attention_heads")
    width = config.integer("hidden_size")
    return ModelSpec(
        vocab_size=config.integer("vocab_size"),
        num_layers=config.integer("num_hidden_layers"),
        model_dim=width,
        mlp_dim=config.integer("intermediate_size"),
        query_heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=config.integer("head_dim", width // heads),
        context=_context(config),
        rope=_rope(config),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=config.get("model_type") == "qwen2",
        eos_token_ids=stated_end_token_ids(directory),
    )


class _Fields:
    """A JSON object whose errors say where they are; null counts as absent."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self._values = values

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        return name in self._values

    def refuse(self, name: str, allowed: str) -> ValueError:
        return ValueError(f"{self.where} {name}={self._values.get(name)!r}; allowed: {allowed}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(name, "an integer of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < math.inf
        ):
            raise self.refuse(name, "a positive number")
        return float(value)


def _refuse_features(config: _Fields) -> None:
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise config.refuse("model_type", ", ".join(MODEL_TYPES))
    if config.get("hidden_act", "silu") != "silu":
        raise config.refuse("hidden_act", "silu")
    for name in ("mlp_bias", "attention_bias"):
        # Llama's attention_bias gives the output projection a bias as well; Qwen2's biases come
        # with its model_type.
        if config.get(name, False):
            raise config.refuse(name, "false")
    if config.get("quantization_config") is not None:
        raise config.refuse("quantization_config", "none; load float weights, or a GGUF file")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise config.refuse("partial_rotary_factor", "1.0")
    context = config.integer("max_position_embeddings")
    # Absent means 4,096 to Mistral; Qwen2 writes a window that it uses only if told so.
    window = config.get("sliding_window")
    if kind == "mistral" and not config.has("sliding_window"):
        window = 4096
    if kind == "qwen2" and not config.get("use_sliding_window", False):
        window = None
    if window is not None and (not isinstance(window, int) or window < context):
        raise config.refuse(
            "sliding_window", f"null, or at least max_position_embeddings={context}"
        )


def _context(config: _Fields) -> int:
    """Longest sequence; YaRN configurations give the trained context and a factor."""
    context = config.integer("max_position_embeddings")
    rope = _rope(config)
    return (
        max(context, int(rope.original_context * rope.factor)) if rope.kind == "yarn" else context
    )


def _rope(config: _Fields) -> RopeSpec:
    """transformers 5 keeps everything in `rope_parameters`, older versions in `rope_theta` and
    `rope_scaling`.
    """
    name = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    values = config.get(name, {})
    if not isinstance(values, dict):
        raise config.refuse(name, "an object")
    scaling = _Fields(f"{config.where} {name}:", values)
    theta = scaling.number("rope_theta", config.number("rope_theta", 10000.0))
    type_field = "rope_type" if scaling.get("rope_type") is not None else "type"
    kind = scaling.get(type_field, "default")
    if kind not in ROPE_TYPES:
        raise scaling.refuse(type_field, ", ".join(ROPE_TYPES))
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.refuse("partial_rotary_factor", "1.0")
    if kind == "default":
        return RopeSpec(theta=theta)
    factor = scaling.number("factor")
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor)
    trained = scaling.integer(
        "original_max_position_embeddings", config.integer("max_position_embeddings")
    )
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        return RopeSpec(
            theta, "llama3", factor, trained, low_freq_factor=low, high_freq_factor=high
        )
    if not scaling.get("truncate", True):
        raise scaling.refuse("truncate", "true")
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=trained,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(scaling, factor),
    )


def _yarn_attention_factor(scaling: _Fields, factor: float) -> float | None:
    """The scale of cos and sin: given, or from the pair `mscale`, `mscale_all_dim`, or None for
    YaRN's own.
    """
    if scaling.get("attention_factor") is not None:
        return scaling.number("attention_factor")
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not (over and under):
        return None
    log = math.log(max(factor, 1.0))
    return (0.1 * over * log + 1.0) / (0.1 * under * log + 1.0)
