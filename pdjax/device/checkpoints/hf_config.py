"""`config.json` of a Hugging Face directory -> ModelSpec, refusing what this project does not
compute.

A field that changes the arithmetic is either honoured or refused by name: a model that loads and
answers almost right is the worst outcome. Which fields those are, and what an absent one means, is
as in transformers 5.24.
"""

from pathlib import Path
from typing import Any

from pdjax.core.model_spec import LARGEST, ModelSpec
from pdjax.device.checkpoints.hf_features import refuse_features
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.checkpoints.hf_rope import read_rope, stretched_context
from pdjax.formats.json_file import read_json
from pdjax.text.end_tokens import stated_end_token_ids

CONFIG_FILE = "config.json"

_COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_ABSENT: dict[str, dict[str, int]] = {
    "llama": _COMMON
    | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _COMMON
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    },
    "qwen2": _COMMON
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    },
}
"""What transformers takes for a field that a file of this model type leaves out."""

MODEL_TYPES = tuple(_ABSENT)


def read_config(directory: Path) -> Fields:
    """The fields of `config.json` in `directory`.

    Raises:
      ValueError: the file is missing or no JSON object.
    """
    return Fields(f"{directory / CONFIG_FILE}:", read_json(directory / CONFIG_FILE))


def read_spec(directory: Path) -> ModelSpec:
    """The architecture that `config.json` in `directory` describes.

    Raises:
      ValueError: naming the field that is missing, malformed or not supported, its value, and what
        is allowed.
    """
    config = read_config(directory)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise config.refuse("model_type", ", ".join(MODEL_TYPES))
    sizes = {name: _size(config, kind, name) for name in _ABSENT["llama"]}
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    layers, context = sizes["num_hidden_layers"], sizes["max_position_embeddings"]
    head_dim = _head_dim(config, kind, width, heads)
    refuse_features(config, kind, layers=layers, context=context, width=width, head_dim=head_dim)
    rope = read_rope(config, context)
    fields: dict[str, Any] = {
        "vocab_size": sizes["vocab_size"],
        "num_layers": layers,
        "model_dim": width,
        "mlp_dim": sizes["intermediate_size"],
        "query_heads": heads,
        "kv_heads": _kv_heads(config, kind, heads),
        "head_dim": head_dim,
        "context": stretched_context(rope, context),
        "rope": rope,
        "norm_eps": config.number("rms_norm_eps", 1e-6),
        "tied": config.boolean("tie_word_embeddings", False),
        "qkv_bias": kind == "qwen2",
        "eos_token_ids": stated_end_token_ids(directory),
    }
    try:
        return ModelSpec(**fields)
    except ValueError as error:
        raise ValueError(f"{config.where} {error}") from error


def _size(config: Fields, kind: str, name: str) -> int:
    return config.integer(name, _ABSENT[kind][name])


def _kv_heads(config: Fields, kind: str, heads: int) -> int:
    """KV heads; null means as many as query heads, and so does no such field to llama."""
    if config.has("num_key_value_heads"):
        if config.get("num_key_value_heads") is None:
            return heads
        return config.integer("num_key_value_heads")
    return _ABSENT[kind].get("num_key_value_heads", heads)


def _head_dim(config: Fields, kind: str, width: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        head_dim = config.integer("head_dim")
    else:
        if width < heads or (kind == "llama" and width % heads):
            raise config.refuse(
                "hidden_size", f"a multiple of num_attention_heads={heads}, or head_dim beside it"
            )
        head_dim = width // heads
    if head_dim > LARGEST["head_dim"]:
        raise config.refuse(
            "head_dim" if config.get("head_dim") is not None else "hidden_size",
            f"heads of at most {LARGEST['head_dim']} dimensions",
        )
    return head_dim
