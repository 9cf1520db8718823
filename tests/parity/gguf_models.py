"""Tiny GGUF models with metadata or tensors that change the computed function, and Hugging Face
directories with the same numbers.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.helpers import tiny_models
from tests.helpers.tiny_gguf import write_gguf

FIXTURE = Path(__file__).parent / "fixtures" / "gguf_logits.npz"
TOKENS = [f"t{i}" for i in range(101)]
"""A vocabulary without meaning: prompts are token ids."""

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_SCALING = "llama.rope.scaling"
_GGUF_YARN = {
    f"{_SCALING}.type": "yarn",
    f"{_SCALING}.factor": 4.0,
    f"{_SCALING}.original_context_length": 16,
}
_GELU = 5e-3  # llama.cpp looks it up in a table of 16-bit floats


@dataclass(frozen=True)
class GGUFModel:
    """A model in both formats.

    Attributes:
      weights: name of the tiny model that gives the weights.
      config: fields of config.json beyond those of the tiny model.
      metadata: fields of the GGUF file beyond the sizes.
      same_in_llama_cpp: whether llama.cpp computes the same; for architecture "llama" it reads only
        the factor and the context of yarn.
      llama_cpp_error: how much its log-probabilities may differ.
      arch: general.architecture.
      extra: tensors of the GGUF file beyond the weights.
    """

    weights: str
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    same_in_llama_cpp: bool = True
    llama_cpp_error: float = 1e-3
    arch: str = "llama"
    extra: dict[str, np.ndarray] = field(default_factory=dict)


MODELS = {
    "plain": GGUFModel("llama"),
    "biases": GGUFModel("qwen2"),
    "yarn": GGUFModel("llama", {"rope_scaling": _YARN}, _GGUF_YARN),
    "yarn_attention": GGUFModel(
        "llama",
        {"rope_scaling": _YARN | {"attention_factor": 1.6}},
        _GGUF_YARN | {f"{_SCALING}.yarn_attn_factor": 1.6},
        same_in_llama_cpp=False,
    ),
    "yarn_betas": GGUFModel(
        "llama",
        {"rope_scaling": _YARN | {"beta_fast": 4.0, "beta_slow": 0.25}},
        _GGUF_YARN | {f"{_SCALING}.yarn_beta_fast": 4.0, f"{_SCALING}.yarn_beta_slow": 0.25},
        same_in_llama_cpp=False,
    ),
    "linear": GGUFModel(
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {f"{_SCALING}.factor": 3.0},
    ),
    "qwen3": GGUFModel("qwen3", arch="qwen3"),
    "olmo2": GGUFModel("olmo2", arch="olmo2"),
    "granite": GGUFModel(
        "granite",
        metadata={
            "granite.attention.scale": 0.1,
            "granite.embedding_scale": 12.0,
            "granite.residual_scale": 0.22,
            "granite.logit_scale": 4.0,
        },
        arch="granite",
    ),
    "smollm3": GGUFModel(
        "smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 4}, arch="smollm3"
    ),
    "phi3": GGUFModel(
        "phi3_longrope",
        metadata={
            "phi3.rope.dimension_count": 12,
            "phi3.rope.scaling.original_context_length": 16,
            "phi3.rope.scaling.attn_factor": (1 + np.log(4) / np.log(16)) ** 0.5,
        },
        arch="phi3",
        extra={
            f"rope_factors_{which}.weight": np.array(
                tiny_models.TINY_MODELS["phi3_longrope"]["rope_scaling"][f"{which}_factor"],
                np.float32,
            )
            for which in ("long", "short")
        },
    ),
    "glm4": GGUFModel("glm4", metadata={"glm4.rope.dimension_count": 12}, arch="glm4"),
    "mixtral": GGUFModel(
        "mixtral",
        {"sliding_window": None},
        {"llama.expert_count": 4, "llama.expert_used_count": 2},
    ),
    "qwen3_moe": GGUFModel(
        "qwen3_moe",
        metadata={
            "qwen3moe.expert_count": 8,
            "qwen3moe.expert_used_count": 3,
            "qwen3moe.expert_feed_forward_length": 32,
        },
        arch="qwen3moe",
    ),
    "gemma2": GGUFModel(
        "gemma2",
        {"query_pre_attn_scalar": 24},
        {
            "gemma2.attention.sliding_window": 7,
            "gemma2.attn_logit_softcapping": 4.0,
            "gemma2.final_logit_softcapping": 3.0,
        },
        llama_cpp_error=_GELU,
        arch="gemma2",
    ),
    "gemma3": GGUFModel(
        "gemma3",
        {"query_pre_attn_scalar": 24},
        {
            "gemma3.attention.sliding_window": 7,
            "gemma3.attention.sliding_window_pattern": 2,
            "gemma3.rope.freq_base": 1e6,
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
        },
        llama_cpp_error=_GELU,
        arch="gemma3",
    ),
}
"""Models by name. Those of architecture "llama" are Llama's, and one with Qwen2's biases."""


def token_ids() -> np.ndarray:
    """Return the compared sequence, i32[24]; the likeliest token after it is not an end token."""
    return np.array([(7 * i + 3) % 101 for i in range(24)], np.int32)


def write(name: str, path: Path) -> Path:
    """Write a model as a GGUF file; return `path`."""
    model = MODELS[name]
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * len(TOKENS),
        "tokenizer.ggml.merges": ["t 1"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    metadata = vocabulary | model.metadata
    return write_gguf(path, model.weights, arch=model.arch, metadata=metadata, extra=model.extra)


def write_hugging_face(name: str, directory: Path) -> Path:
    """Write a model as a Hugging Face directory; return the directory."""
    model = MODELS[name]
    directory.mkdir()
    config = tiny_models.TINY_MODELS[model.weights] | model.config
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tiny_models.tensors(model.weights)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
