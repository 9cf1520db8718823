"""Variants of the files of a Hugging Face directory, each a change of a tiny model.

`make_config_fixtures.py` reads them with transformers; the tests read them with this project.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.helpers import tiny_models

TRAINED = "original_max_position_embeddings"
_YARN = {"rope_type": "yarn", "factor": 4.0, TRAINED: 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    TRAINED: 32,
}
_DEFAULT = {"rope_type": "default", "rope_theta": 900.0}
_LINEAR = {"type": "linear", "factor": 2.0}


def _yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": _YARN | changes}


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 500.0},
    "theta null": {"rope_theta": None},
    "theta null inside": {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    "theta outside": {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
    "theta twice": {"rope_theta": 500.0, "rope_parameters": _DEFAULT},
    "old beside new": {"rope_scaling": _LINEAR, "rope_parameters": _DEFAULT},
    "old beside new, and theta": {
        "rope_theta": 500.0,
        "rope_scaling": _LINEAR,
        "rope_parameters": _DEFAULT,
    },
    "yarn beside new": {"rope_scaling": _YARN, "rope_parameters": _DEFAULT},
    "llama3 beside new": {"rope_scaling": _LLAMA3, "rope_parameters": _DEFAULT},
    "empty old beside new": {"rope_scaling": {}, "rope_parameters": _LINEAR | {"rope_theta": 9.0}},
    "null old beside new": {"rope_scaling": None, "rope_parameters": _LINEAR},
    "empty new": {"rope_parameters": {}, "rope_theta": 500.0},
    "no type": {"rope_scaling": {"factor": 2.0}},
    "null type": {"rope_scaling": {"type": None, "factor": 2.0}},
    "both types": {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
    "default beside linear": {"rope_scaling": {"rope_type": "default", "type": "linear"}},
    "yarn": _yarn(),
    "yarn, trained nowhere": {"rope_scaling": _without(_YARN, TRAINED)},
    "yarn, trained outside": {"rope_scaling": _without(_YARN, TRAINED), TRAINED: 16},
    "yarn, trained twice": {**_yarn(), TRAINED: 32},
    "yarn, trained null": {**_yarn(), TRAINED: None},
    "yarn, factor null": _yarn(factor=None),
    "yarn, factor nowhere": {"rope_scaling": _without(_YARN, "factor")},
    "yarn, factor below one": _yarn(factor=0.5),
    "yarn, attention_factor": _yarn(attention_factor=2.0),
    "yarn, attention_factor outside": {**_yarn(), "attention_factor": 2.0},
    "yarn, mscale": _yarn(mscale=1.0, mscale_all_dim=0.5),
    "yarn, one mscale": _yarn(mscale=2.0, mscale_all_dim=0),
    "yarn, betas": _yarn(beta_fast=8, beta_slow=2, **{TRAINED: 128}),
    "yarn, betas of zero": _yarn(beta_fast=0, beta_slow=0, **{TRAINED: 128}),
    "yarn, betas swapped": _yarn(beta_fast=1, beta_slow=32, **{TRAINED: 128}),
    "yarn, not truncated": _yarn(truncate=False, **{TRAINED: 128}),
    "yarn, truncate null": _yarn(truncate=None, **{TRAINED: 128}),
    "yarn, trained on little": _yarn(**{TRAINED: 4}),
    "yarn, theta 1": {**_yarn(), "rope_theta": 1},
    "yarn, theta below one": {**_yarn(), "rope_theta": 0.5},
    "llama3": {"rope_scaling": _LLAMA3},
    "llama3, trained twice": {"rope_scaling": _LLAMA3, TRAINED: 16},
    "llama3, trained nowhere": {"rope_scaling": _without(_LLAMA3, TRAINED)},
    "llama3, band swapped": {
        "rope_scaling": _LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}
    },
    "llama3, no band": {"rope_scaling": _LLAMA3 | {"high_freq_factor": 1.0}},
    "llama3, half a band": {"rope_scaling": _without(_LLAMA3, "low_freq_factor")},
    "linear, no factor": {"rope_scaling": {"type": "linear"}},
    "nested, qwen2": {"model_type": "qwen2", "rope_parameters": {"full_attention": _YARN}},
    "no context": {"max_position_embeddings": ..., "rope_scaling": _without(_YARN, TRAINED)},
    "head_dim null": {"head_dim": None},
    "head_dim": {"head_dim": 24},
}
"""Changes of the tiny Llama's config.json; `...` removes a field."""


def write_config(directory: Path, changes: dict[str, Any]) -> Path:
    """Write a directory with the changed config.json and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    values = _without(tiny_models.TINY_MODELS["llama"], "rope_theta") | changes
    values = {name: value for name, value in values.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return directory


MODELS = (
    "old beside new",
    "tied with another head",
    "tied, head only",
    "names without model.",
    "stale single file beside an index",
    "mistral, layer types",
    "qwen2, window of no layer",
    "qwen2, trained outside",
    "llama, window",
)
"""Directories with weights; tests compare their logits."""


def write_model(kind: str, directory: Path) -> str:
    """Write the directory; return the name of the tiny model that has its tokens."""
    name = "mistral" if kind.startswith("mistral") else "smollm2"
    name = "qwen2" if kind.startswith("qwen2") else name
    directory.mkdir(parents=True, exist_ok=True)
    values, found = dict(tiny_models.TINY_MODELS[name]), tiny_models.tensors(name)
    head = np.random.default_rng(3).normal(0, 0.1, found["model.embed_tokens.weight"].shape)
    layers: int = values["num_hidden_layers"]
    if kind == "old beside new":
        values |= {"rope_scaling": _YARN, "rope_parameters": _DEFAULT}
    elif kind == "tied with another head":
        found["lm_head.weight"] = head.astype(np.float32)
    elif kind == "tied, head only":
        found["lm_head.weight"] = found.pop("model.embed_tokens.weight")
    elif kind == "names without model.":
        found = {key.removeprefix("model."): tensor for key, tensor in found.items()}
    elif kind == "stale single file beside an index":
        index = {"weight_map": dict.fromkeys(found, "a.safetensors")}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file(found, directory / "a.safetensors", metadata={"format": "pt"})
        found = {key: 1.5 * tensor for key, tensor in found.items()}
    elif kind == "mistral, layer types":
        values |= {"sliding_window": 8, "layer_types": ["full_attention"] * layers}
    elif kind == "qwen2, window of no layer":
        values |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": layers}
    elif kind == "qwen2, trained outside":
        values |= {"rope_scaling": _YARN, TRAINED: 32}
    elif kind == "llama, window":
        values |= {"sliding_window": 8}
    (directory / "config.json").write_text(json.dumps(values))
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
    return name
