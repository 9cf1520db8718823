"""Measures the device's ceilings through JAX: the rates that steps are compared with."""

import time
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from experiments.common.loops import noise, seconds_each

GIB = 2**30


@dataclass(frozen=True)
class Ceilings:
    """Rates a second, and the time of a dispatch.

    Attributes:
      copy: bytes copied, counting both reads and writes.
      read: bytes read by a search for an array's largest element.
      matmul: operations of bfloat16 products, in a burst of a few hundredths of a second.
      matmul_sustained: the same over about a second, since a power-limited card clocks down.
        Prefill, which computes without pause, is compared with this rate.
      dispatch_us: the host's time for a jitted call with ten arguments, microseconds.
    """

    copy: float
    read: float
    matmul: float
    matmul_sustained: float
    dispatch_us: float


def measure() -> Ceilings:
    """Measure all ceilings: for about two seconds on an accelerator, with less work on a CPU."""
    small = jax.default_backend() == "cpu"
    size, width = (GIB // 128, 512) if small else (2 * GIB, 8192)
    sustained = 0.1 if small else 1.0
    copy, read = _memory(size)
    burst, steady = _products(width, sustained)
    return Ceilings(copy, read, burst, steady, _dispatch_us())


def _memory(size: int) -> tuple[float, float]:
    """Measure the bytes a second copied and read, in an array of `size` bytes."""
    x = noise((size // 2,), jnp.bfloat16)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    largest = jax.jit(jnp.max)

    def copy() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    copied = 2 * size / seconds_each(copy, 0.05)
    return copied, size / seconds_each(lambda: largest(x), 0.05)


def _products(width: int, sustained: float) -> tuple[float, float]:
    """Measure the operations a second of products of `width` x `width`: in a burst, and for
    `sustained` seconds.

    Each program begins with the same numbers: an endless chain of products would end in numbers
    that cost less power, or overflow.
    """
    a, b = noise((width, width), jnp.bfloat16, 1), noise((width, width), jnp.bfloat16, 2)
    in_a_row = 8

    @jax.jit
    def chain(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(in_a_row):
            a = lax.optimization_barrier(a @ b)
        return a

    run = partial(chain, a, (b.astype(jnp.float32) * width**-0.5).astype(b.dtype))
    flops = in_a_row * 2 * width**3
    burst = flops / seconds_each(run, sustained / 30, rounds=1)
    return burst, flops / seconds_each(run, sustained, rounds=1)


def _dispatch_us() -> float:
    """Measure the microseconds until a call with ten arguments returns; its work ends later."""
    args = [jnp.full((), i, jnp.float32) for i in range(10)]
    add = jax.jit(lambda *args: sum(args))
    jax.block_until_ready(add(*args))
    calls = 200
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        results = [add(*args) for _ in range(calls)]
        best = min(best, time.perf_counter() - began)
        jax.block_until_ready(results)
    return best / calls * 1e6
