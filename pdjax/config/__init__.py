"""The config of a run. Re-exports the dataclasses of this folder."""

from pdjax.config.handoff import HandoffConfig
from pdjax.config.kv import DTYPES, USUAL_FRACTION, KVConfig
from pdjax.config.policies import PoliciesConfig
from pdjax.config.roles import RolesConfig
from pdjax.config.schema import (
    NO_CACHE,
    RANDOM,
    Config,
    DecodeConfig,
    ModelConfig,
    PrefillConfig,
)
from pdjax.config.tiers import TiersConfig

__all__ = [
    "DTYPES",
    "NO_CACHE",
    "RANDOM",
    "USUAL_FRACTION",
    "Config",
    "DecodeConfig",
    "HandoffConfig",
    "KVConfig",
    "ModelConfig",
    "PoliciesConfig",
    "PrefillConfig",
    "RolesConfig",
    "TiersConfig",
]
