"""A tiny model in place of SmolLM2, for tests of what a user copies: examples, blocks of docs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pdjax.config import Config
from pdjax.config.load import load_config
from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints import open as opening
from pdjax.device.checkpoints.api import tensor_shapes
from pdjax.device.checkpoints.catalog import CATALOG
from pdjax.device.checkpoints.huggingface import HuggingFaceCheckpoint
from tests.helpers.tiny_tokenizer import write_directory

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 8192,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
}
"""Cut like SmolLM2: three KV heads, layers for five stages."""

SPEC = ModelSpec(257, 5, 24, 48, 6, 3, 4, 8192, tied=True)
"""The same, for the shapes of its tensors."""

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def write_model(directory: Path) -> Path:
    """A Hugging Face directory with bytes as tokens, a chat template and random weights."""
    write_directory(directory, {"eos_token": "<s>"}, TEMPLATE)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    chance = np.random.default_rng(0)
    shapes = tensor_shapes(SPEC)
    found = {
        name: chance.normal(1 if "norm" in name else 0, 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(found, directory / "model.safetensors")
    return directory


def replace_smollm2(patch: pytest.MonkeyPatch, directory: Path) -> None:
    """Open `directory` where the catalogue's model is asked for, and let every LLM compile as few
    programs as can serve its config."""
    opened = opening._open

    def open_stand_in(source: Any) -> Any:
        return HuggingFaceCheckpoint(directory) if str(source) in CATALOG else opened(source)

    def load_cold(source: Any, overrides: Any = None) -> Any:
        return few_programs(load_config(source, overrides))

    patch.setattr(opening, "_open", open_stand_in)
    patch.setattr("pdjax.llm.load_config", load_cold)


def few_programs(config: Config) -> Config:
    """Leave a bucket of each kind and a layer group where a config names none, and no warm-up."""
    p, d, handoff, longest = (
        config.prefill,
        config.decode,
        config.handoff,
        config.model.max_model_len,
    )
    widths: tuple[Any, Any] = (None, None)
    if longest is not None:
        whole, own = -(-longest // config.kv.page_size), -(-longest // config.decode_page_size)
        widths = (p.max_sequences * whole,), (own,)
    if not config.colocated and handoff.layer_groups is None:
        handoff = replace(handoff, layer_groups=1)
    return replace(
        config,
        prefill=replace(
            p,
            token_buckets=p.token_buckets or (p.token_budget,),
            page_buckets=p.page_buckets or widths[0],
        ),
        decode=replace(
            d,
            row_buckets=d.row_buckets or (d.rows // d.stages,),
            page_buckets=d.page_buckets or widths[1],
        ),
        handoff=handoff,
        warm_up=False,
    )
