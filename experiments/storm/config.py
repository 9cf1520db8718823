"""A tiny model with random weights: what `experiments.storm` serves unless another is named."""

from experiments.common.tiny import tiny_spec
from pdjax.config import (
    RANDOM,
    Config,
    DecodeConfig,
    HandoffConfig,
    KVConfig,
    ModelConfig,
    PrefillConfig,
)


def get_config() -> Config:
    """Prefill on one device, decode in two stages on two others."""
    return Config(
        model=ModelConfig(source=RANDOM, spec=tiny_spec(512)),
        kv=KVConfig(page_size=16, prefix_cache=True),
        prefill=PrefillConfig(
            token_budget=128, max_sequences=4, token_buckets=(128,), page_buckets=(32,)
        ),
        decode=DecodeConfig(stages=2, rows=8, page_buckets=(32,)),
        handoff=HandoffConfig(layer_groups=2),
        cpu_devices=3,
        max_recorded=100,  # else memory grows until 10,000 requests are recorded
    )
