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


@dataclass(frozen=True)
class GGUFModel:
    """A model in both formats.

    Attributes:
      weights: name of the tiny model that gives the weights.
      config: fields of config.json beyond those of the tiny model.
      metadata: fields of the GGUF file beyond the sizes.
      same_in_llama_cpp: whether llama.cpp computes the same; for this architecture it reads only
        the factor and the context of yarn.
    """

    weights: str
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    same_in_llama_cpp: bool = True


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
}
"""Models by name; each is written as architecture "llama", even the one with Qwen2's biases."""


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
    return write_gguf(path, model.weights, arch="llama", metadata=vocabulary | model.metadata)


def write_hugging_face(name: str, directory: Path) -> Path:
    """Write a model as a Hugging Face directory; return the directory."""
    model = MODELS[name]
    directory.mkdir()
    config = tiny_models.TINY_MODELS[model.weights] | model.config
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tiny_models.tensors(model.weights)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
