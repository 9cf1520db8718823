"""Engines on one device that share their weights; the pool of each holds exactly one case."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.common.loops import noise, noisy_pages
from experiments.common.replaced import replace_method
from pallas_kernels.grouped_product.api import grouped_product
from pallas_kernels.product.api import product
from pallas_kernels.quantised import elements_of
from pdjax.config import Config
from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.core.model_spec import ModelSpec
from pdjax.core.moe_spec import MoeSpec
from pdjax.device.engine import JaxEngine
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.kv.transports import Transports
from pdjax.device.mesh import PREFILL_RULES, make_mesh
from pdjax.device.models.family import Layer
from pdjax.device.models.registry import kv_layout
from pdjax.device.models.weights import random_params
from pdjax.device.programs.decode import DecodeProgram
from pdjax.device.programs.mixed import MixedProgram
from pdjax.device.programs.prefill import PrefillProgram
from pdjax.device.programs.program import Program
from pdjax.interfaces.batches import DecodeBatch, PrefillBatch
from pdjax.interfaces.steps import DecodeStep, MixedStep, PrefillStep, Step


@dataclass(frozen=True)
class StepTime:
    """The times of a case.

    Attributes:
      seconds: seconds a step, the median of the rounds.
      rounds: seconds a step of each round.
      dispatch_s: seconds of the host a step, the median; close to `seconds` if the host is the
        limit, or if it has to wait until the device takes more work.
      compile_s: seconds to trace and compile the model's program.
      temporary_bytes: memory that the program needs beside arguments and results; None if unknown.
    """

    seconds: float
    rounds: tuple[float, ...]
    dispatch_s: float
    compile_s: float
    temporary_bytes: int | None


class StepEngines:
    """A model's random weights on the first device, and engines that compute with them.

    Args:
      spec: the model.
      dtype: type of weights and pools.
      page_size: tokens a page.
      kv_dtype: type of decode pools; None takes `dtype`.
    """

    def __init__(
        self, spec: ModelSpec, dtype: str, page_size: int, kv_dtype: str | None = None
    ) -> None:
        self.spec = spec
        self.layout = kv_layout(spec, page_size, dtype)
        own = kv_dtype or dtype
        self._decode_layout = replace(self.layout, dtype=own, itemsize=jnp.dtype(own).itemsize)
        # On one device the rules of both phases place all weights alike.
        self._mesh = make_mesh(jax.devices()[:1], 1, 1)
        began = time.perf_counter()
        layers = self.layout.stage_layers
        self._params = random_params(spec, self._mesh, PREFILL_RULES, layers, dtype)
        jax.block_until_ready(self._params)
        self.weights_s = time.perf_counter() - began

    def time_decode(
        self, batches: Sequence[DecodeBatch], pages: int, attention: str | None, rounds: int
    ) -> tuple[StepTime, Callable[[], object]]:
        """Time ticks back to back, with tokens fed back on the device and only the last ones read.

        Returns:
          The time, and a function that runs the last tick once more.
        """
        pool = self._pool(self._decode_layout, pages)
        program = self._decode_program(pool, batches[0], attention)
        size = program.size(len(batches[0].tokens))
        engine, compiled = _engine(pool, program), _Compiled(size, "tick")
        steps = [DecodeStep(batch) for batch in batches]
        times = _time(engine, steps, rounds)
        return compiled.step_time(*times), lambda: engine.submit(steps[-1]).result()

    def _decode_program(
        self, pool: PoolOwner, batch: DecodeBatch, attention: str | None
    ) -> DecodeProgram:
        return DecodeProgram(
            self._params,
            self.spec,
            pool,
            rows=len(batch.sampling.seed),
            context=batch.page_table.shape[-1] * self.layout.page_size,
            max_logprobs=Config().max_logprobs,
            attention=attention,
        )

    def time_mixed(
        self,
        steps: Sequence[MixedStep],
        before: Sequence[PrefillBatch],
        pages: int,
        attention: str | None,
        rounds: int,
    ) -> tuple[StepTime, StepTime, Callable[[], object]]:
        """Time mixed steps back to back, and for comparison the same chunks and rows in steps of
        their own, in turn.

        Args:
          before: run once before, since they write the KV that the chunks read.

        Returns:
          The time of a mixed step, that of two steps instead, and a function that runs the last
          mixed step once more.
        """
        pool = self._pool(self.layout, pages)
        rows = self._decode_program(pool, steps[0].rows, attention)
        chunks = PrefillProgram(self._params, self.spec, pool, max_logprobs=Config().max_logprobs)
        mixed = MixedProgram(chunks, rows, self._params, self.spec, pool, attention=attention)
        engine, compiled = _engine(pool, chunks, rows, mixed), _Compiled(mixed, "_step")
        for batch in before:
            engine.submit(PrefillStep(batch)).result()
        together = compiled.step_time(*_time(engine, steps, rounds))
        apart: list[Step] = []
        for step in steps:
            apart += [PrefillStep(step.chunks), DecodeStep(step.rows)]
        seconds, dispatch_s = _time(engine, apart, rounds)
        two = compiled.step_time([2 * each for each in seconds], 2 * dispatch_s)
        return together, two, lambda: engine.submit(steps[-1]).result()

    def time_products(self, tokens: int, last: int, steps: int, rounds: int) -> float:
        """Seconds of a step's products alone, each weight's with so many tokens, and the
        vocabulary's with those `last`: the median of the rounds, each of so many steps back to
        back."""
        layers = [_matrices(layer, self.spec) for layer in self._params.layers]
        dtype = self._params.final_norm.dtype
        used = self.spec.experts_per_token if isinstance(self.spec, MoeSpec) else 1
        kinds = {w.shape[:-1] for layer in layers for w in layer}
        given = {
            kind: noise((tokens * (used if len(kind) > 1 else 1), kind[-1]), dtype)
            for kind in kinds
        }
        few = noise((last, self.spec.model_dim), dtype)

        @jax.jit
        def step(
            given: dict[tuple[int, ...], jax.Array], few: jax.Array, layers: Any, unembed: Any
        ) -> Any:
            for weights in layers:
                made = [_times(given[w.shape[:-1]], w) for w in weights]
                # In turn, and none is left out although nobody reads it.
                given, few, made = lax.optimization_barrier((given, few, made))
            logits = lax.dot(few, unembed, preferred_element_type=jnp.float32)
            return lax.optimization_barrier((given, few, logits))[:2]

        def run() -> float:
            nonlocal given, few
            began = time.perf_counter()
            for _ in range(steps):
                given, few = step(given, few, layers, self._params.unembed)
            jax.block_until_ready(few)
            return (time.perf_counter() - began) / steps

        return statistics.median([run() for _ in range(1 + rounds)][1:])

    def time_prefill(
        self, batches: Sequence[PrefillBatch], pages: int, steps: int, rounds: int
    ) -> tuple[StepTime, Callable[[], object]]:
        """Time the last batch, `steps` times back to back. All batches run once before, since they
        write the KV that the last one reads.

        Returns:
          The time, and a function that runs the last batch once more.
        """
        pool = self._pool(self.layout, pages)
        program = PrefillProgram(self._params, self.spec, pool, max_logprobs=Config().max_logprobs)
        engine, compiled = _engine(pool, program), _Compiled(program, "_step")
        for batch in batches[:-1]:
            engine.submit(PrefillStep(batch)).result()
        last = PrefillStep(batches[-1])
        times = _time(engine, [last] * steps, rounds)
        return compiled.step_time(*times), lambda: engine.submit(last).result()

    def _pool(self, layout: KVLayout, pages: int) -> PoolOwner:
        """Make a pool full of noise."""
        pool = PoolOwner(layout, pages, self._mesh, PREFILL_RULES)
        first = elements_of(pool.arrays[0][0])
        shape, where = first.shape, first.sharding
        del first
        fill = jax.jit(lambda seed: noisy_pages(shape, layout.dtype, seed), out_shardings=where)
        for layer in range(layout.slots):  # layer by layer, since two whole pools might not fit
            pool.arrays[layer] = fill(2 * layer), fill(2 * layer + 1)
        return pool


def _matrices(layer: Layer, spec: ModelSpec) -> list[jax.Array]:
    """Those of a layer, [A, B], and those of experts, [E, A, B]."""
    found = []
    for name, w in layer.items():
        of_experts = isinstance(spec, MoeSpec) and name.startswith("w_experts")
        kept = 2 if of_experts else 1
        if w.ndim > 1:
            found.append(w.reshape(*w.shape[:kept], -1))
    return found


def _times(x: jax.Array, w: jax.Array) -> jax.Array:
    """x times a matrix, or, its rows dealt out equally, times those of experts."""
    if w.ndim == 2:
        return product(x, w)
    sizes = jnp.diff(jnp.arange(len(w) + 1) * len(x) // len(w)).astype(jnp.int32)
    return grouped_product(x, w, sizes)


def _engine(pool: PoolOwner, *programs: Program) -> JaxEngine:
    """An engine of some programs, whose pages go nowhere."""
    return JaxEngine(EngineId("bare/0"), PoolId("hbm/0"), pool, programs, Transports([]))


class _Compiled:
    """Looks on as an engine's program compiles.

    Args:
      owner: of a program that has run nothing yet.
      name: of its attribute that is the program.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.compile_s = 0.0
        self.temporary_bytes: int | None = None
        step = getattr(owner, name)

        def first(*args: Any) -> Any:
            began = time.perf_counter()
            memory = step.program.form(args).memory_analysis()  # the call below finds it
            self.compile_s = time.perf_counter() - began
            self.temporary_bytes = getattr(memory, "temp_size_in_bytes", None)
            replace_method(owner, name, step)
            return step(*args)

        replace_method(owner, name, first)

    def step_time(self, rounds: Sequence[float], dispatch_s: float) -> StepTime:
        """Combine the times of steps with the program's compilation."""
        seconds = statistics.median(rounds)
        return StepTime(seconds, tuple(rounds), dispatch_s, self.compile_s, self.temporary_bytes)


def _time(engine: JaxEngine, steps: Sequence[Step], rounds: int) -> tuple[list[float], float]:
    """Seconds a step of each round, and of the host in the median one."""
    whole, host = [], []
    for _ in range(1 + rounds):  # the first round warms up
        began = time.perf_counter()
        tickets = [engine.submit(step) for step in steps]
        dispatched = time.perf_counter()
        tickets[-1].result()
        whole.append((time.perf_counter() - began) / len(steps))
        host.append((dispatched - began) / len(steps))
    return whole[1:], statistics.median(host[1:])
