"""What a run is: the dataclasses of `schema.py`, importable from here."""

from pdjax.config.schema import (
    DTYPES,
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
    "RANDOM",
    "Config",
    "DecodeConfig",
    "HandoffConfig",
    "KVConfig",
    "ModelConfig",
    "PrefillConfig",
]
