"""Moved to pdjax/model_spec.py (shared words, no jax); this shim goes away at integration. Import from there."""

from pdjax.model_spec import ModelSpec as ModelSpec
from pdjax.model_spec import RopeSpec as RopeSpec
