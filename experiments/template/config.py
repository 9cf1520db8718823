"""The config that `experiments.template` starts from; any field may be overridden by a flag."""

from pdjax.config import Config, DecodeConfig, HandoffConfig, KVConfig, PrefillConfig


def get_config() -> Config:
    """One engine of each kind, for prompts and answers of at most 4,096 tokens together."""
    return Config(
        kv=KVConfig(page_size=64, prefix_cache=False),
        prefill=PrefillConfig(max_sequences=8),
        decode=DecodeConfig(rows=64),
        handoff=HandoffConfig(layer_groups=4),
    )
