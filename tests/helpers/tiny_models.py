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

from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints import api
from pdjax.device.checkpoints.hf_fields import Fields
from pdjax.device.models.family import EMBED, FINAL_NORM
from pdjax.device.models.registry import FAMILIES, family_of

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

_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.3, 1.9, 2.6, 3.1, 4.0],
}
_GEMMA = {
    "head_dim": 24,  # not the width over the heads
    "num_hidden_layers": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 20,
    "sliding_window": 7,
    "tie_word_embeddings": True,
}


def _of(kind: str, architecture: str, **changes: Any) -> dict[str, Any]:
    names: dict[str, Any] = {"model_type": kind, "architectures": [f"{architecture}ForCausalLM"]}
    names["pad_token_id"] = 0  # some types' own lies beyond the vocabulary
    return _BASE | names | changes


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
    "mistral_window": _of("mistral", "Mistral", sliding_window=9, rope_theta=10000.0),
    "qwen3": _of("qwen3", "Qwen3", head_dim=24, rope_theta=1000000.0, tie_word_embeddings=True),
    "qwen3_yarn": _of(
        *("qwen3", "Qwen3"),
        head_dim=24,
        rope_theta=1000000.0,
        rope_scaling=_YARN,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=0,
    ),
    "olmo2": _of("olmo2", "Olmo2", rope_theta=500000.0),
    "granite": _of(
        *("granite", "Granite"),
        rope_theta=10000.0,
        embedding_multiplier=12.0,
        attention_multiplier=0.1,
        residual_multiplier=0.22,
        logits_scaling=4.0,
        tie_word_embeddings=True,
    ),
    "smollm3": _of(
        *("smollm3", "SmolLM3"),
        num_hidden_layers=4,
        no_rope_layers=[1, 0, 1, 0],
        rope_theta=5000.0,
        tie_word_embeddings=True,
    ),
    "smollm3_interval": _of(
        *("smollm3", "SmolLM3"),
        num_hidden_layers=4,
        no_rope_layer_interval=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    ),
    "phi3": _of("phi3", "Phi3", rope_theta=10000.0, sliding_window=9),
    "phi3_longrope": _of(
        *("phi3", "Phi3"),
        partial_rotary_factor=0.75,
        original_max_position_embeddings=16,
        rope_scaling=_LONGROPE,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    ),
    "phi3_longrope_short": _of(
        *("phi3", "Phi3"),
        partial_rotary_factor=0.75,
        original_max_position_embeddings=32,
        rope_parameters=_LONGROPE | {"rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    ),
    "glm": _of(
        *("glm", "Glm"),
        attention_bias=True,
        head_dim=16,
        partial_rotary_factor=0.5,
        rope_theta=10000.0,
    ),
    "glm4": _of(
        *("glm4", "Glm4"),
        attention_bias=False,
        head_dim=24,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "gemma2": _of("gemma2", "Gemma2", rope_theta=10000.0)
    | _GEMMA
    | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
    "gemma3": _of("gemma3_text", "Gemma3")
    | _GEMMA
    | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "mixtral": _of(
        *("mixtral", "Mixtral"),
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=9,
        rope_theta=10000.0,
    ),
    "qwen2_moe": _of(
        *("qwen2_moe", "Qwen2Moe"),
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=40,
        decoder_sparse_step=2,
        rope_theta=10000.0,
    ),
    "qwen3_moe": _of(
        *("qwen3_moe", "Qwen3Moe"),
        head_dim=24,
        num_local_experts=8,  # as transformers 5.24 writes it
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    ),
    "gemma3_old": _of("gemma3_text", "Gemma3", rope_theta=50000.0, rope_local_base_freq=100.0)
    | _GEMMA
    | {"sliding_window_pattern": 2, "sliding_window": 64},
}
"""`config.json` by name, in the style of transformers 4 (`rope_theta`, `rope_scaling`) or 5
(`rope_parameters`)."""

SHARDED = ("smollm2",)
"""Models that spread their tensors over several files with an index."""

BY_EXPERT = ("mixtral", "qwen2_moe")
"""Models that keep a tensor for each expert, as transformers 4 does, and 5 unless it is told to."""


def tensors(name: str) -> dict[str, np.ndarray]:
    """Make the weights of a tiny model, by their Hugging Face names."""
    config = TINY_MODELS[name]
    if config["model_type"] not in ("llama", "mistral", "qwen2"):
        return _tensors_of_family(name)
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


def _tensors_of_family(name: str) -> dict[str, np.ndarray]:
    """Make the weights of a tiny model by the shapes that its family declares; transformers refuses
    or renames what does not fit its own."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    spec = _spec(name)
    less_one = {tensor for tensor, _, told in api.tensors(spec) if told.less_one}
    # Where embeddings are scaled up, drawn ones would outweigh what layers add, so that a tied
    # model repeated its last token for ever.
    scale = family_of(spec).around(spec).embed_scale
    gains = {EMBED.name: 0.5 / scale, FINAL_NORM.name: 4 * scale} if scale > 1 else {}

    def draw(tensor: str, shape: tuple[int, ...]) -> np.ndarray:
        if tensor in gains:
            drawn = rng.normal(tensor == FINAL_NORM.name, shape[-1] ** -0.5, shape)
            return gains[tensor] * drawn - (tensor in less_one)
        if len(shape) > 1:
            gain = 2.0 if "q_proj" in tensor or "k_proj" in tensor or "qkv" in tensor else 1.0
            gain = 3.0 if tensor.endswith("mlp.gate.weight") else gain
            return gain * rng.normal(0, shape[-1] ** -0.5, shape)
        if tensor.endswith("bias"):
            return rng.normal(0, 0.5, shape)
        return rng.normal(0 if tensor in less_one else 1, 0.2, shape)

    shapes = api.tensor_shapes(spec)
    return {tensor: draw(tensor, shape).astype(np.float32) for tensor, shape in shapes.items()}


def by_expert(name: str) -> dict[str, np.ndarray]:
    """Return the weights of a tiny model by the names of transformers 4, an expert's by itself."""
    spec = _spec(name)
    found = tensors(name)
    for tensor, _, told in api.tensors(spec):
        prefix = tensor.removesuffix(told.name)
        if told.old:
            found[prefix + told.old] = found.pop(tensor)
        if told.of_expert:
            for i, expert in enumerate(found.pop(tensor)):
                halves = np.split(expert, len(told.of_expert))
                for part, values in zip(told.of_expert, halves, strict=True):
                    found[prefix + part.format(i)] = values
    return found


def _spec(name: str) -> ModelSpec:
    fields = Fields("config.json:", TINY_MODELS[name])
    return FAMILIES[str(TINY_MODELS[name]["model_type"])].spec(fields)


def tokens(name: str) -> np.ndarray:
    """Return the sequence for the comparison of logits, i32[LENGTH]."""
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    return rng.integers(0, TINY_MODELS[name]["vocab_size"], LENGTH, dtype=np.int32)


def write(name: str, directory: Path) -> Path:
    """Write a tiny model as a Hugging Face directory; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY_MODELS[name]))
    found = by_expert(name) if name in BY_EXPERT else tensors(name)
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
