"""JAX calls that differ between versions, are private, or are untyped: no other file makes them."""

import contextlib
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def use_virtual_cpu_devices(count: int) -> None:
    """Ask for `count` CPU devices, if JAX has not started and may run on the CPU.

    A backend that has started keeps its number of devices; `mesh.take_devices` raises if they are
    too few.
    """
    platforms = jax.config.jax_platforms  # None: JAX takes an accelerator, if any, and the CPU
    if jax.config.jax_num_cpu_devices >= count or not (
        platforms is None or "cpu" in platforms.split(",")
    ):
        return
    with contextlib.suppress(RuntimeError):  # the backend is up already
        jax.config.update("jax_num_cpu_devices", count)


def has_compilation_cache() -> bool:
    """Whether somebody has told JAX where to keep compiled programs, or not to."""
    return jax.config.jax_compilation_cache_dir is not None or (
        not jax.config.jax_enable_compilation_cache
    )


def keep_compilations(directory: str, most_bytes: int | None = None) -> None:
    """Cache every program compiled from now on in `directory`, and load programs cached there.

    JAX's lower bounds on size and compile time are off. On GPUs JAX lets XLA keep its autotuning
    results there, too (`jax_persistent_cache_enable_xla_caches`, on by default).

    Args:
      directory: is made if it does not exist.
      most_bytes: bound of its size; None leaves JAX's setting, which is no bound by default.
    """
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if most_bytes is not None and jax.config.jax_compilation_cache_max_size == -1:
        jax.config.update("jax_compilation_cache_max_size", most_bytes)
    # JAX reads the setting once, when it first compiles; the reset makes it read again.
    compilation_cache.reset_cache()


def keep_no_compilations() -> None:
    """Neither cache programs compiled from now on, nor load cached ones."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def all_ready(arrays: Any) -> bool:
    """Whether every array of the tree can be read without a wait. (`is_ready` is public, but
    untyped.)"""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(arrays))


def is_sound(arrays: Any) -> bool:
    """Wait for every array of the tree; return whether all can be read.

    An array that is deleted, or the result of a failed computation, cannot be read. (`is_deleted`
    is public, but untyped.)
    """
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(arrays)):
        return False
    try:
        jax.block_until_ready(arrays)
    except Exception:
        return False
    return True
