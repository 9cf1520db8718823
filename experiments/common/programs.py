"""Programs as a new process has them."""

import jax

from pdjax.device.sharing import rehearsals


def clear_programs() -> None:
    """Let JAX forget what it has traced and compiled, and pdjax what it has rehearsed."""
    jax.clear_caches()
    rehearsals.cache_clear()  # type: ignore[attr-defined]
