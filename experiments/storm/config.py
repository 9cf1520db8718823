"""A tiny model with random weights: what `experiments.storm` serves unless another is named."""

from pdjax.config import (
    RANDOM,
    Config,
    DecodeConfig,
    HandoffConfig,
    KVConfig,
    ModelConfig,
    PrefillConfig,
)
from pdjax.core.model_spec import ModelSpec


def get_config() -> Config:
    """Prefill on one device, decode in two stages on two others."""
    spec = ModelSpec(
        vocab_size=101,
        num_layers=4,
        model_dim=32,
        mlp_dim=64,
        query_heads=4,
        kv_heads=2,
        head_dim=8,
        context=512,
    )
    return Config(
        model=ModelConfig(source=RANDOM, spec=spec),
        kv=KVConfig(page_size=16, prefix_cache=True),
        prefill=PrefillConfig(
            token_budget=128, max_sequences=4, token_buckets=(128,), page_buckets=(32,)
        ),
        decode=DecodeConfig(stages=2, rows=8, page_buckets=(32,)),
        handoff=HandoffConfig(layer_groups=2),
        cpu_devices=3,
        max_recorded=100,  # else memory grows until 10,000 requests are recorded
    )
