"""Gives every test sixteen virtual CPU devices, before JAX starts, and traces and compiles each
step once, however many tests and processes build it.

`JAX_PLATFORMS=cuda pytest tests/e2e -k 1-1-1` runs the tests that fit on the accelerators at hand.
"""

import gc
import os
import signal
import sys
from pathlib import Path

if sys.dont_write_bytecode:
    # Tests start dozens of processes, and to compile JAX's modules takes each of them seconds. What
    # asks for no bytecode asks for none among the sources.
    folder = str(Path(__file__).parents[1] / ".cache" / "python")
    sys.dont_write_bytecode, sys.pycache_prefix = False, folder
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = folder

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    # Tests compile much and run each program a few times. Most of the time went into optimizations,
    # into a context of MLIR for each fusion, and into modules of LLVM, of which a program has one
    # now. Modules are also mapped one by one, and Linux lets a process map 65,530 regions: with
    # many a program, LLVM ends a process that has hundreds of programs.
    flags = (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
    os.environ["XLA_FLAGS"] = " ".join(flags)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so; some tests send the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax

from pdjax.device.compilation_cache import use_compilation_cache

if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
use_compilation_cache(None)  # before any LLM does: tests of single steps keep them, too

# To trace and lower makes many objects that stay, and what looks for garbage goes through them all.
gc.set_threshold(100_000, 20, 20)
