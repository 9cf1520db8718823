"""Programs as a new process has them."""

import jax

from pdjax.device.sharing import forget


def clear_programs() -> None:
    """Let JAX and pdjax forget what they have traced, compiled and rehearsed."""
    jax.clear_caches()
    forget()
