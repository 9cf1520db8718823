"""Gives every test sixteen virtual CPU devices, before JAX starts, and traces and compiles each
step once, however many tests and processes build it.

`JAX_PLATFORMS=cuda pytest tests/e2e -k 1-1-1` runs the tests that fit on the accelerators at hand.
"""

import os
import signal
import sys
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"

if sys.dont_write_bytecode:
    # Tests start a hundred processes, and to compile JAX's modules takes each of them seconds. What
    # asks for no bytecode asks for none among the sources.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(CACHE / "python")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    # Tests compile much and run each program a few times: XLA's optimizations took a fifth of their
    # time.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so; some tests send the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax

from pdjax.device.compilation_cache import use_compilation_cache

if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_compilation_cache_dir", str(CACHE / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
use_compilation_cache(None)  # before any LLM does: tests of single steps keep them, too
