"""Configs by name."""

from collections.abc import Callable

from pdjax.config import RANDOM, Config, DecodeConfig, KVConfig, ModelConfig, PrefillConfig
from pdjax.core.model_spec import ModelSpec, RopeSpec

LLAMA3_8B = ModelSpec(
    vocab_size=128256,
    num_layers=32,
    model_dim=4096,
    mlp_dim=14336,
    query_heads=32,
    kv_heads=8,
    head_dim=128,
    context=8192,
    rope=RopeSpec(theta=500000.0),
)
"""The shapes of meta-llama/Meta-Llama-3-8B."""


def _llama3_8b() -> Config:
    return Config(
        model=ModelConfig(source=RANDOM, spec=LLAMA3_8B, dtype="bfloat16", max_model_len=8192),
        kv=KVConfig(page_size=64),
        prefill=PrefillConfig(token_budget=2048),
        decode=DecodeConfig(rows=64, lookahead=2),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "smollm2": lambda: Config(model=ModelConfig(max_model_len=1024), colocated=None),
    "smollm2_colocated": lambda: Config(model=ModelConfig(max_model_len=1024), colocated=True),
    "llama3_8b": _llama3_8b,
}
"""`smollm2` and `smollm2_colocated` serve the embedded model: the first prefills and decodes on one
device each, where there are two, the second does both on one device. `llama3_8b` has the shapes of
Llama 3 8B and random weights, for measurements and simulations: one device prefills, one decodes.
"""
