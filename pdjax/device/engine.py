"""The owners of a mesh. Each holds the parameters, the pool (donated to every step, so nobody else
may keep it) and the compiled steps of its phase, and hands out a Ticket for each piece of work it
dispatches.

A batch of nothing but padding is a rehearsal: every variant of choosing tokens runs on it, so that
whoever warms an engine up need not know that there are any.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from pdjax.core.kv_layout import split_groups
from pdjax.core.model_spec import ModelSpec
from pdjax.device.compat import all_ready, is_sound
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.mesh import shardings
from pdjax.device.models.decoder import Params
from pdjax.device.models.sampling import VARIANTS, Asked, Choice, Wanted
from pdjax.device.packing import Packed
from pdjax.device.steps import decode, prefill
from pdjax.device.steps.sample import Undecided, make_sample_step
from pdjax.interfaces.batches import IDLE_ROW, DecodeBatch, PrefillBatch, Sampled, SamplingBatch


class SampledTicket:
    """Tokens on their way to the host's memory, where the step writes them."""

    def __init__(
        self,
        choice: Choice,
        sampling: SamplingBatch,
        max_logprobs: int,
        inspect: Callable[[], None],
    ) -> None:
        """`choice` is for the numpy `sampling`; `max_logprobs` is how many a row gets; `inspect` is
        called if the step has failed, since whatever it wrote has failed with it."""
        self._leaves = jax.tree.leaves(choice) if sampling.logprobs.any() else [choice.tokens]
        self._max_logprobs, self._inspect = max_logprobs, inspect
        self._sampled: Sampled | None = None

    def ready(self) -> bool:
        return all_ready(self._leaves)

    def result(self) -> Sampled:
        if self._sampled is None:
            try:
                tokens, *logprobs = [np.asarray(leaf) for leaf in self._leaves]
            except Exception:
                self._inspect()
                raise
            self._sampled = Sampled(tokens, *(logprobs or self._blank(len(tokens))))
        return self._sampled

    def _blank(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape = rows, self._max_logprobs
        return np.zeros(rows, np.float32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)


class JaxPrefillEngine:
    """Prefill on a tensor-parallel mesh; see `interfaces.PrefillEngine`."""

    def __init__(
        self,
        params: Params,
        spec: ModelSpec,
        pool: PoolOwner,
        *,
        max_logprobs: int,
        layer_groups: int = 1,
    ) -> None:
        self.layout = pool.layout
        self.num_pages = pool.num_pages
        self.layer_groups = split_groups(spec.num_layers, layer_groups)
        self._params = params
        self._pool = pool
        self._max_logprobs = min(max_logprobs, spec.vocab_size)
        self._step = prefill.make_prefill_step(params, spec, pool.layout.tp, layer_groups)
        self._sample = make_sample_step(pool.mesh, self._max_logprobs)

    def prefill(
        self, batch: PrefillBatch, after_group: Callable[[int], None] | None = None
    ) -> SampledTicket:
        with self._pool.donated():
            undecided = self._dispatch(prefill.pack(batch), after_group or (lambda group: None))
        for asked in self._asked(batch):
            history = batch.history if asked.variant.penalize else None
            *_, choice = self._sample(undecided, None, history, asked)
        return SampledTicket(choice, batch.sampling, self._max_logprobs, self._pool.inspect)

    @property
    def losses(self) -> int:
        return self._pool.losses

    def close(self) -> None:
        self._pool.close()
        self._params = replace(self._params, layers=[], final_norm=None, unembed=None, embed=None)

    def _dispatch(self, packed: Packed, after_group: Callable[[int], None]) -> Undecided:
        if isinstance(self._step, prefill.GroupedPrefillStep):
            return self._step(self._params, self._pool, packed, after_group)
        self._pool.arrays, undecided = self._step(self._params, self._pool.arrays, packed)
        after_group(0)
        return undecided

    def _asked(self, batch: PrefillBatch) -> list[Asked]:
        """How tokens are chosen; of a rehearsal, in all ways that its history allows."""
        if batch.kv_lens.any():
            return [Asked.of(batch.sampling)]
        penalize = batch.history is not None
        variants = [variant for variant in VARIANTS if variant.penalize <= penalize]
        return [Asked.of(batch.sampling, variant) for variant in variants]


class JaxDecodeEngine:
    """Decode on a pipeline of stages; see `interfaces.DecodeEngine`."""

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
        self._max_logprobs = min(max_logprobs, spec.vocab_size)
        self._tick = decode.make_decode_tick(params, spec, pool.layout, attention=attention)
        self._sample = make_sample_step(pool.mesh, self._max_logprobs)
        self._uploads = _Uploads(pool.mesh)
        # What lives on the device from tick to tick: see `make_decode_tick`; and i32[R * b, C], the
        # tokens of every row, for penalties.
        b = rows // pool.layout.stages
        self._make_state = _zeros(
            pool.mesh,
            (decode.X_SPEC, (rows, spec.model_dim), params.final_norm.dtype),
            (PartitionSpec(), (b, spec.vocab_size), jnp.dtype("float32")),
            (PartitionSpec(), (b,), jnp.dtype("int32")),
            (PartitionSpec(), (), jnp.dtype("int32")),
            (PartitionSpec(), (b,), jnp.dtype("int32")),
            (PartitionSpec(), (rows, context), jnp.dtype("int32")),
        )
        self._state_losses = 0
        self._carried: Any  # decode.Carried; as the other two, None once the engine is closed
        self._fed_back: Any
        self._history: Any
        self._begin()
        self._write_history = jax.jit(
            lambda history, row, ids: history.at[row].set(ids), donate_argnums=0
        )

    def _begin(self) -> None:
        """The state that lives from tick to tick, of rows nobody sits in."""
        x, logits, positions, row, self._fed_back, self._history = self._make_state()
        self._carried = decode.Carried(x, Undecided(logits, positions, row))

    def tick(self, batch: DecodeBatch) -> SampledTicket:
        with self._donated():
            self._pool.arrays, self._carried = self._tick(
                self._params,
                self._pool.arrays,
                self._carried,
                self._fed_back,
                decode.pack(batch),
            )
            for asked in self._asked(batch):
                self._fed_back, self._history, choice = self._sample(
                    self._carried.undecided, self._fed_back, self._history, asked
                )
        return SampledTicket(choice, batch.sampling, self._max_logprobs, self._inspect)

    def remember(self, row: int, token_ids: np.ndarray) -> None:
        with self._donated():
            self._history = self._write_history(self._history, np.int32(row), token_ids)

    @property
    def losses(self) -> int:
        return self._pool.losses + self._state_losses

    def close(self) -> None:
        self._pool.close()
        self._params = replace(self._params, layers=[], final_norm=None, unembed=None, embed=None)
        self._carried = self._fed_back = self._history = None
        self._uploads.clear()

    @contextmanager
    def _donated(self) -> Iterator[None]:
        """A block that donates the pool or the state, see `PoolOwner.donated`."""
        with self._pool.donated():
            try:
                yield
            except BaseException:
                self._inspect()
                raise

    def _inspect(self) -> None:
        """Make anew, of pool and state, what is deleted or whose computation has failed."""
        self._pool.inspect()
        if not is_sound((self._carried, self._fed_back, self._history)):
            self._begin()
            self._state_losses += 1

    def _asked(self, batch: DecodeBatch) -> list[Asked]:
        """How tokens are chosen; of a rehearsal, in all ways."""
        if (batch.positions != IDLE_ROW).any():
            return [self._uploads.of(decode.leaving_microbatch(batch), batch.sampling)]
        return [self._uploads.new(batch.sampling, variant) for variant in VARIANTS]


class _Uploads:
    """What microbatches ask for, kept on the device for as long as the host hands over the same
    object."""

    def __init__(self, mesh: Mesh) -> None:
        self._everywhere = shardings(mesh, PartitionSpec())
        self._kept: dict[int, tuple[SamplingBatch, Asked]] = {}

    def of(self, microbatch: int, sampling: SamplingBatch) -> Asked:
        """What the numpy `sampling` asks for."""
        kept = self._kept.get(microbatch)
        if kept is None or kept[0] is not sampling:
            kept = self._kept[microbatch] = sampling, self.new(sampling)
        return kept[1]

    def clear(self) -> None:
        """Keep nothing."""
        self._kept.clear()

    def new(self, sampling: SamplingBatch, variant: Wanted | None = None) -> Asked:
        """The same as `variant`, or as the cheapest one, takes it."""
        return jax.device_put(Asked.of(sampling, variant), self._everywhere)


def _zeros(
    mesh: Mesh, *wanted: tuple[PartitionSpec, tuple[int, ...], jnp.dtype]
) -> Callable[[], tuple[jax.Array, ...]]:
    """Makes arrays of zeros, each given as (PartitionSpec, shape, dtype)."""
    return jax.jit(
        lambda: tuple(jnp.zeros(shape, dtype) for _, shape, dtype in wanted),
        out_shardings=tuple(shardings(mesh, spec) for spec, _, _ in wanted),
    )
