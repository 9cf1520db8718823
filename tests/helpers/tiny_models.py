"""Tiny Hugging Face checkpoints of every supported architecture, made from a seed.

Only their logits are committed: the same seed gives the same weights to `make_fixtures.py`, which
runs them in transformers, and to the tests, which run them here.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LENGTH = 24
"""Tokens of the compared sequence; more than the trained context where RoPE is stretched."""

_BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 101,  # prime: no number of shards divides it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}

TINY_MODELS: dict[str, dict[str, Any]] = {
    "llama": _BASE | {"rope_theta": 10000.0},
    "llama3": _BASE | {"rope_theta": 500.0, "rope_scaling": _LLAMA3},
    "llama_linear": _BASE
    | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    "llama_yarn": _BASE | {"rope_parameters": _YARN | {"rope_theta": 10000.0}},
    "mistral": _BASE | _MISTRAL | {"head_dim": 24, "sliding_window": None, "rope_theta": 1000000.0},
    "smollm2": _BASE | {"tie_word_embeddings": True, "rope_theta": 100000.0},
    "qwen2": _BASE | _QWEN2 | {"tie_word_embeddings": True, "rope_theta": 1000000.0},
    "qwen2_yarn": _BASE
    | _QWEN2
    | {"rope_theta": 10000.0, "rope_scaling": _YARN | {"attention_factor": 1.25}},
}
"""`config.json` by name, in the style of transformers 4 (`rope_theta`, `rope_scaling`) or 5
(`rope_parameters`)."""

SHARDED = ("smollm2",)
"""Models that spread their tensors over several files with an index."""


def tensors(name: str) -> dict[str, np.ndarray]:
    """Make the weights of a tiny model, by their Hugging Face names."""
    config = TINY_MODELS[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h = config.get("head_dim", d // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * h, config["num_key_value_heads"] * h

    def matrix(rows: int, cols: int) -> np.ndarray:
        return rng.normal(0, cols**-0.5, (rows, cols)).astype(np.float32)

    def norm() -> np.ndarray:
        return rng.normal(1, 0.2, d).astype(np.float32)

    found = {"model.embed_tokens.weight": matrix(v, d), "model.norm.weight": norm()}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = matrix(v, d)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found[prefix + "input_layernorm.weight"] = norm()
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            found[prefix + f"self_attn.{part}_proj.weight"] = 2 * matrix(rows, d)
            if config["model_type"] == "qwen2":
                bias = rng.normal(0, 0.5, rows).astype(np.float32)
                found[prefix + f"self_attn.{part}_proj.bias"] = bias
        found[prefix + "self_attn.o_proj.weight"] = matrix(d, q)
        found[prefix + "post_attention_layernorm.weight"] = norm()
        found[prefix + "mlp.gate_proj.weight"] = matrix(f, d)
        found[prefix + "mlp.up_proj.weight"] = matrix(f, d)
        found[prefix + "mlp.down_proj.weight"] = matrix(d, f)
    return found


def tokens(name: str) -> np.ndarray:
    """Return the sequence for the comparison of logits, i32[LENGTH]."""
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    return rng.integers(0, TINY_MODELS[name]["vocab_size"], LENGTH, dtype=np.int32)


def write(name: str, directory: Path) -> Path:
    """Write a tiny model as a Hugging Face directory; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY_MODELS[name]))
    found = tensors(name)
    if name not in SHARDED:
        save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for part in range(2):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        names = list(found)[part::2]
        save_file({key: found[key] for key in names}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
