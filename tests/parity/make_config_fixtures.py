"""Make the fixtures of `test_config_kinds.py` with Hugging Face transformers.

Made with Python 3.11, torch 2.13.0, transformers 5.24.0 (the versions are also written into the
fixture). In an environment with these and this project's own dependencies, run from the repository
root:

    python -m tests.parity.make_config_fixtures

It writes `fixtures/config_ropes.json` (frequencies and scales of RoPE, or null where transformers
raises) and `fixtures/config_logits.npz` (logits of the last position).
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from tests.helpers import tiny_models
from tests.parity import config_kinds

FIXTURES = Path(__file__).parent / "fixtures"
_ROTARY = {"llama": LlamaRotaryEmbedding, "qwen2": Qwen2RotaryEmbedding}


def rope(changes: dict[str, Any]) -> dict[str, Any] | None:
    """Compute RoPE's frequencies and scale with transformers; None if it raises."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = config_kinds.write_config(Path(scratch), changes)
        try:
            config = AutoConfig.from_pretrained(directory)
            made = _ROTARY[config.model_type](config)
        except Exception:  # any exception means that transformers refuses this configuration
            return None
        frequencies = [float(f"{value:.8g}") for value in made.inv_freq.tolist()]
        return {"frequencies": frequencies, "scale": float(made.attention_scaling)}


def logits(kind: str) -> np.ndarray:
    """Compute the logits f32[V] behind the last token."""
    with tempfile.TemporaryDirectory() as scratch:
        name = config_kinds.write_model(kind, Path(scratch))
        model = AutoModelForCausalLM.from_pretrained(
            scratch, dtype=torch.float32, attn_implementation="eager"
        )
        ids = torch.tensor(tiny_models.tokens(name)[None].astype(np.int64))
        with torch.inference_mode():
            return model(ids).logits[0, -1].numpy()


def main() -> None:
    """Write both fixtures."""
    FIXTURES.mkdir(exist_ok=True)
    ropes = {kind: rope(changes) for kind, changes in config_kinds.ROPES.items()}
    versions = {name: version(name) for name in ("torch", "transformers")}
    lines = ",\n".join(f"{json.dumps(kind)}: {json.dumps(made)}" for kind, made in ropes.items())
    text = f'{{"versions": {json.dumps(versions)},\n"ropes": {{\n{lines}\n}}}}\n'
    (FIXTURES / "config_ropes.json").write_text(text)
    found: dict[str, Any] = {kind: logits(kind) for kind in config_kinds.MODELS}
    np.savez_compressed(FIXTURES / "config_logits.npz", **found)


if __name__ == "__main__":
    main()
