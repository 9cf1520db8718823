"""Measures times without the host's part: many calls in one program, many programs back to back."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantised import LIMITS, Pages, QuantisedPages, encode

Operation = Callable[[Any, Any], Any]
"""(carry, operands) -> the carry of the next call."""


def noise(shape: Sequence[int], dtype: jax.typing.DTypeLike, seed: int = 0) -> jax.Array:
    """Make numbers of mean 0 and variance 1 on the device. Zeros would not do: they draw less power
    than real numbers, and a card that draws less clocks higher."""
    return _noise(tuple(shape), jnp.dtype(dtype).name, seed)


def noisy_pages(shape: Sequence[int], dtype: str, seed: int = 0) -> Pages:
    """Make pages [K, P, S, H] full of noise; pages with scales are as `quantised.encode` makes
    them."""
    if dtype not in LIMITS:
        return noise(shape, dtype, seed)
    return _noisy_pages(tuple(shape), dtype, seed)


@partial(jax.jit, static_argnums=(0, 1))
def _noisy_pages(shape: tuple[int, ...], dtype: str, seed: jax.Array) -> QuantisedPages:
    return QuantisedPages(*encode(_noise(shape, "bfloat16", seed), dtype))


@partial(jax.jit, static_argnums=(0, 1))
def _noise(shape: tuple[int, ...], dtype: str, seed: jax.Array) -> jax.Array:
    """Hash each element's position; this compiles faster than `jax.random`."""
    bits = jnp.full(shape, seed, jnp.uint32) * jnp.uint32(0x27D4EB2F)
    for axis in range(len(shape)):
        bits = (bits ^ lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA77)
        bits = bits ^ (bits >> 13)
    unit = (bits >> 8).astype(jnp.float32) / 2**23 - 1  # uniform in [-1, 1)
    return (unit * 3**0.5).astype(dtype)


def seconds_each(run: Callable[[], Any], seconds: float, rounds: int = 3) -> float:
    """Time one of many runs that are dispatched back to back, each ordered behind the last.

    Args:
      run: dispatches work and returns an array that is ready once the work is done.
      seconds: approximate length of a round, which has at least two runs.
      rounds: number of rounds; the median counts.
    """
    jax.block_until_ready(run())  # compiles
    once = _round(run, 1)
    count = int(min(max(seconds / once, 2), 10_000))
    return statistics.median(_round(run, count) for _ in range(rounds))


def _round(run: Callable[[], Any], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        last = run()
    jax.block_until_ready(last)
    return (time.perf_counter() - began) / count


def seconds_a_call(
    operation: Operation,
    carry: Any,
    operands: Sequence[Any],
    *,
    calls: int,
    seconds: float = 0.05,
    rounds: int = 3,
) -> float:
    """Time a call inside one program, without the time of a dispatch.

    Args:
      operation: takes the result of the call before it, so that it must wait for that call.
      carry: argument of the first call; donated.
      operands: arguments of calls in turn, so that no cache holds the data that the next one reads.
      calls: approximate calls of a program: enough to outlast the dispatch of the next program.
      seconds, rounds: see `seconds_each`.
    """
    # A turn of the loop has several calls, since a turn costs a kernel or two of its own.
    unrolled = max(len(operands), 4)
    order = [i % len(operands) for i in range(unrolled)]
    turns = max(1, round(calls / unrolled))
    one = jax.jit(operation)  # lowers a kernel once for all calls

    @partial(jax.jit, donate_argnums=0)
    def program(carry: Any, operands: Sequence[Any]) -> Any:
        def turn(_: int, carry: Any) -> Any:
            for i in order:
                # The barrier keeps all of the result, even where the next call takes a part.
                carry = lax.optimization_barrier(one(carry, operands[i]))
            return carry

        # The number of turns is static; otherwise the host would read the counter at each turn.
        return lax.fori_loop(0, turns, turn, carry)

    operands = tuple(operands)

    def run() -> Any:
        nonlocal carry
        carry = program(carry, operands)
        return carry

    return seconds_each(run, seconds, rounds) / (turns * unrolled)
