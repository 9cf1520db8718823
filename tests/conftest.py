"""Sixteen virtual CPU devices for every test, before JAX starts, and one compilation for each
program, however many tests build it.

`JAX_PLATFORMS=cuda pytest tests/e2e -k 1-1-1` runs what fits on the accelerators there are.
"""

import os
from pathlib import Path

# Tests compile much and run each program a few times: a fifth of their time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax  # noqa: E402

if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
