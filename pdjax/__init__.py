"""pdjax serves language models with prefill and decode on different JAX device meshes.

The public names are bound at their first use, so that importing pdjax, or a room of it that needs
no device, does not start JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdjax.async_llm import AsyncLLM
    from pdjax.config import Config
    from pdjax.config.load import load_config
    from pdjax.core.guide import Guide
    from pdjax.core.outputs import RequestOutput
    from pdjax.core.request import SamplingParams
    from pdjax.core.slo import SLO
    from pdjax.llm import LLM

__all__ = [
    "LLM",
    "SLO",
    "AsyncLLM",
    "Config",
    "Guide",
    "RequestOutput",
    "SamplingParams",
    "load_config",
]

_HOMES = {
    "LLM": "pdjax.llm",
    "AsyncLLM": "pdjax.async_llm",
    "Config": "pdjax.config",
    "load_config": "pdjax.config.load",
    "SamplingParams": "pdjax.core.request",
    "Guide": "pdjax.core.guide",
    "RequestOutput": "pdjax.core.outputs",
    "SLO": "pdjax.core.slo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pdjax' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
