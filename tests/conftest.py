"""Sixteen virtual CPU devices for every test, before JAX starts.

`JAX_PLATFORMS=cuda pytest tests/e2e -k 1-1-1` runs what fits on the accelerators there are.
"""

import jax

if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 16)
