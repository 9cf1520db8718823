"""Where JAX versions differ, or need a private door: the only file that may know."""

import contextlib
from typing import Any

import jax


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


def all_ready(arrays: Any) -> bool:
    """Whether reading any array of the tree would not wait. (`is_ready` is public, but untyped.)"""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(arrays))
