"""Where JAX versions differ, or need a private door: the only file that may know."""

import contextlib
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


def use_virtual_cpu_devices(count: int) -> None:
    """Ask for `count` CPU devices, if JAX has not started and will run on the CPU.

    Once a backend has started the number is what it is; whoever deals devices out says so if they
    are too few.
    """
    platforms = (
        jax.config.jax_platforms
    )  # None: JAX will take an accelerator if it finds one, and the CPU as well
    if jax.config.jax_num_cpu_devices >= count or not (
        platforms is None or "cpu" in platforms.split(",")
    ):
        return
    with contextlib.suppress(RuntimeError):  # the backend is up already
        jax.config.update("jax_num_cpu_devices", count)


def keep_compilations(directory: str) -> None:
    """Keep every program that is compiled from now on in `directory`, however small and quick, and
    take from there what is there already. On GPUs JAX lets XLA keep its autotuning results beside
    them (`jax_persistent_cache_enable_xla_caches`, on unless somebody switches it off).
    """
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX looks at the setting once, when it first compiles; this makes it look again.
    compilation_cache.reset_cache()


def all_ready(arrays: Any) -> bool:
    """Whether reading any array of the tree would not wait. (`is_ready` is public, but untyped.)"""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(arrays))


def is_sound(arrays: Any) -> bool:
    """Whether every array of the tree can be read: none is deleted, and none stands for a
    computation that failed. Waits for them. (`is_deleted` is public, but untyped.)"""
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(arrays)):
        return False
    try:
        jax.block_until_ready(arrays)
    except Exception:
        return False
    return True
