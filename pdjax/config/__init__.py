"""The config of a run. Re-exports the dataclasses of `schema.py`."""

from pdjax.config.policies import PoliciesConfig
from pdjax.config.schema import (
    DTYPES,
    NO_CACHE,
    RANDOM,
    Config,
    DecodeConfig,
    HandoffConfig,
    KVConfig,
    ModelConfig,
    PrefillConfig,
)

__all__ = [
    "DTYPES",
    "NO_CACHE",
    "RANDOM",
    "Config",
    "DecodeConfig",
    "HandoffConfig",
    "KVConfig",
    "ModelConfig",
    "PoliciesConfig",
    "PrefillConfig",
]
