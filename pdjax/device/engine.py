"""The owners of a mesh. Each holds the parameters, the pool (donated to every step, so nobody else
may keep it) and the compiled steps of its phase, and hands out a Ticket for each piece of work it
dispatches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from pdjax.device.compat import all_ready
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.mesh import shardings
from pdjax.device.model.sampling import Choice
from pdjax.device.model.transformer import Params
from pdjax.device.steps.decode import STATE_SPECS, TickInput, TickState, make_decode_tick
from pdjax.device.steps.prefill import make_prefill_step, make_sample_step
from pdjax.engine_api import DecodeBatch, PrefillBatch, Sampled
from pdjax.model_spec import ModelSpec


class SampledTicket:
    """Tokens on their way from the device. Log-probabilities travel only if somebody asked for
    them."""

    def __init__(self, choice: Choice, wants_logprobs: bool) -> None:
        self._choice = choice
        self._leaves = jax.tree.leaves(choice) if wants_logprobs else [choice.tokens]
        self._sampled: Sampled | None = None
        for leaf in self._leaves:
            leaf.copy_to_host_async()

    def ready(self) -> bool:
        return all_ready(self._leaves)

    def result(self) -> Sampled:
        if self._sampled is None:
            host = [np.asarray(leaf) for leaf in self._leaves]
            if len(host) == 1:
                rows, n = self._choice.top_ids.shape
                blank = (
                    np.zeros(rows, np.float32),
                    np.zeros((rows, n), np.int32),
                    np.zeros((rows, n), np.float32),
                )
                self._sampled = Sampled(host[0], *blank)
            else:
                self._sampled = Sampled(*host)
        return self._sampled


class JaxPrefillEngine:
    """Prefill on a tensor-parallel mesh; see `engine_api.PrefillEngine`."""

    def __init__(
        self, params: Params, spec: ModelSpec, pool: PoolOwner, *, max_logprobs: int
    ) -> None:
        self.layout = pool.layout
        self.num_pages = pool.num_pages
        self._params = params
        self._pool = pool
        self._step = make_prefill_step(params, spec, pool.layout.tp)
        self._sample = make_sample_step(params, max_logprobs)

    def prefill(self, batch: PrefillBatch) -> SampledTicket:
        history, batch = batch.history, replace(batch, history=None)
        self._pool.arrays, logits = self._step(self._params, self._pool.arrays, batch)
        choice = self._sample(logits, batch.kv_lens, batch.sampling, history)
        return SampledTicket(choice, bool(batch.sampling.logprobs.any()))


class JaxDecodeEngine:
    """Decode on a pipeline of stages; see `engine_api.DecodeEngine`."""

    def __init__(
        self,
        params: Params,
        spec: ModelSpec,
        pool: PoolOwner,
        *,
        rows: int,
        context: int,
        max_logprobs: int,
        attention: str | None,
    ) -> None:
        """`rows` over all microbatches; `context` is the longest sequence, tokens."""
        self.layout = pool.layout
        self.num_pages = pool.num_pages
        self._params = params
        self._pool = pool
        self._microbatch_rows = rows // pool.layout.stages
        self._tick = make_decode_tick(
            params, spec, pool.layout, max_logprobs=max_logprobs, attention=attention
        )
        self._state = self._initial_state(rows, context, params.final_norm.dtype, spec.model_dim)
        self._write_history = jax.jit(
            lambda history, row, ids: history.at[row].set(ids), donate_argnums=0
        )

    def tick(self, batch: DecodeBatch) -> SampledTicket:
        stages = self.layout.stages
        leaving = (batch.tick - stages + 1) % stages
        inp = TickInput(
            tokens=batch.tokens,
            positions=batch.positions,
            page_table=batch.page_table,
            leaving_positions=np.array(batch.positions[-1]),
            leaving_row=np.int32(leaving * self._microbatch_rows),
            sampling=batch.sampling,
        )
        self._pool.arrays, self._state, choice = self._tick(
            self._params, self._pool.arrays, self._state, inp
        )
        return SampledTicket(choice, bool(batch.sampling.logprobs.any()))

    def remember(self, row: int, token_ids: np.ndarray) -> None:
        history = self._write_history(self._state.history, np.int32(row), token_ids)
        self._state = replace(self._state, history=history)

    def _initial_state(
        self, rows: int, context: int, dtype: jnp.dtype, model_dim: int
    ) -> TickState:
        make = jax.jit(
            lambda: TickState(
                x=jnp.zeros((rows, model_dim), dtype),
                fed_back=jnp.zeros(self._microbatch_rows, jnp.int32),
                history=jnp.zeros((rows, context), jnp.int32),
            ),
            out_shardings=shardings(self._pool.mesh, STATE_SPECS),
        )
        return make()
