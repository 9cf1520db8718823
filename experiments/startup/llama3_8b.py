"""Llama-3-8B shapes with random weights, for starts on GPUs; `colocated=True` for one GPU."""

from experiments.common.shapes import random_model
from pdjax.config import Config, DecodeConfig, KVConfig, PrefillConfig


def get_config() -> Config:
    """One device to prefill and one to decode, with default buckets."""
    return Config(
        model=random_model("llama3_8b", 8192),
        kv=KVConfig(page_size=64, prefix_cache=False),
        prefill=PrefillConfig(token_budget=2048, max_sequences=8),
        decode=DecodeConfig(rows=64, lookahead=2),
    )
